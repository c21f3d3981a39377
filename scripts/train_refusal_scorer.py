"""Train the shipped refusal scorer on phrasings of our own, and write its weights; `--check` only compares.

    python scripts/train_refusal_scorer.py [--check]

`studies/refusal_labels/phrasings.txt` is a grammar of refusing and complying answers. Some thousands of each are drawn
from it, with a fixed seed; a logistic regression with an L2 penalty is fitted to them, and kept as whole numbers of 8
bits. No labelled data is read. Needs numpy and scipy (the `report` extra); a minute on one core.
"""

from __future__ import annotations

import base64
import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from holdfast.drift.refusal_scorer import BUCKETS, CHARACTERS, FORMAT, SHIPPED, buckets
from scipy.optimize import minimize
from scipy.sparse import csr_matrix

PHRASINGS = Path(__file__).parents[1] / "studies" / "refusal_labels" / "phrasings.txt"
ANSWERS, SEED, PENALTY = 40_000, 5, 2.0


def grammar(text: str) -> dict[str, list[str]]:
    """Alternatives by name, as phrasings.txt writes them."""
    lists: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("[") and line.endswith("]"):
            current = lists.setdefault(line[1:-1], [])
        elif line and not line.startswith("#"):
            current.append(line)
    return lists


def draw(lists: dict[str, list[str]], name: str, random_: random.Random) -> str:
    """One answer of the kind `name`, drawn from the grammar."""
    return re.sub(r"\{(\w+)\}", lambda slot: draw(lists, slot[1], random_), random_.choice(lists[name]))


def answers(n: int = ANSWERS, seed: int = SEED) -> tuple[list[str], list[bool]]:
    """N distinct answers, half of them refused, and whether they are."""
    lists, random_ = grammar(PHRASINGS.read_text(encoding="utf-8")), random.Random(seed)
    drawn: dict[str, bool] = {}
    for refused, kind in ((True, "refused"), (False, "complied")):
        wanted = len(drawn) + n // 2
        while len(drawn) < wanted:
            drawn.setdefault(draw(lists, kind, random_), refused)
    return list(drawn), list(drawn.values())


def matrix(texts: Sequence[str]) -> csr_matrix:
    """The features of each answer, [answers, BUCKETS + 1], each row of length about 1; the last column is the bias."""
    rows, columns, values = [], [], []
    for row, text in enumerate(texts):
        found = buckets(text)
        rows += [row] * (len(found) + 1)
        columns += [bucket for bucket, _ in found] + [BUCKETS]
        values += [sign / len(found) ** 0.5 for _, sign in found] + [1.0]
    return csr_matrix((values, (rows, columns)), shape=(len(texts), BUCKETS + 1))


def fit(x: csr_matrix, refused: Sequence[bool], penalty: float = PENALTY) -> np.ndarray:
    """Weights and, last, the bias that minimise the sum of log losses + penalty/2 |w|^2; the bias is free."""
    target = np.where(refused, 1.0, -1.0)
    free = np.append(np.full(x.shape[1] - 1, penalty), 0.0)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = target * (x @ w)
        slope = -target / (1 + np.exp(np.clip(margin, -500, 500)))
        return float(np.logaddexp(0, -margin).sum() + 0.5 * (free * w) @ w), x.T @ slope + free * w

    return minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x


def shipped(weights: np.ndarray) -> str:
    """The weights as the JSON that `Scorer` reads: whole numbers of 8 bits times a scale."""
    scale = float(np.abs(weights[:-1]).max() / 127)
    small = np.rint(weights[:-1] / scale).astype(np.int8)
    record = {
        "format": FORMAT, "trained": f"scripts/train_refusal_scorer.py on {ANSWERS} answers of our own phrasing",
        "characters": CHARACTERS, "bias": round(float(weights[-1]), 6), "scale": round(scale, 9),
        "weights": base64.b64encode(small.tobytes()).decode(),
    }  # fmt: skip
    return json.dumps(record, indent=1) + "\n"


def main() -> None:
    """Write the weights, or say that they are not those that this script makes."""
    texts, refused = answers()
    new = shipped(fit(matrix(texts), refused))
    if "--check" not in sys.argv:
        SHIPPED.write_text(new, encoding="utf-8")
        return
    pair = (json.loads(text)["weights"] for text in (new, SHIPPED.read_text(encoding="utf-8")))
    here, there = (np.frombuffer(base64.b64decode(weights), np.int8).astype(int) for weights in pair)
    if (moved := np.abs(here - there).max()) > 2:  # another BLAS may round a weight the other way
        sys.exit(f"{SHIPPED.name} is not what phrasings.txt gives (weights differ by {moved} of 127): run me.")


if __name__ == "__main__":
    main()
