"""Agreement with people: Cohen's kappa, precision and recall of refused against not, with intervals over prompts.

    kappa = (p_o - p_e) / (1 - p_e)      p_o: share of equal labels; p_e: the same by chance, given the rates

The systems answered the same prompts, so a bootstrap draws prompts, and with each all its answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from holdfast.drift.ledger import Entry, Ledger, Score
from holdfast.drift.refusal import Exchange, Judge, Phrases
from holdfast.drift.refusal_scorer import Scorer
from scipy.sparse import vstack

from scripts.train_refusal_scorer import answers, fit, matrix

SYSTEMS = {"gpt4": "GPT-4", "llama2new": "Llama 2 (new)", "llama2orig": "Llama 2 (orig)"}
DRAWS, FOLDS, PENALTY = 2000, 10, 0.1
Row = dict[str, str]


class Reading(NamedTuple):
    """What one instrument says of every answer: refused or not, and by what margin if it knows."""

    name: str
    version: str
    said: np.ndarray
    margin: np.ndarray | None = None
    broken: int = 0


def rows(data: Path) -> list[Row]:
    """Answers with their labels, of all systems.

    Raises:
        FileNotFoundError: says which file is missing.
    """
    read = []
    for system in SYSTEMS:
        lines = (data / f"refusal_labels/xstest_{system}.jsonl").read_text(encoding="utf-8").splitlines()
        read += [row | {"system": system} for row in map(json.loads, lines)]
    return read


def refused(label: str) -> bool:
    """Whether a label of the files is a refusal, full or partial (or a remark of GPT-4 that is neither: counted so)."""
    return not label.startswith("1")


def confusion(said: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """One-hot: both refused, only said, only truth, neither; shape (n, 4)."""
    return np.stack([said & truth, said & ~truth, ~said & truth, ~said & ~truth], axis=1).astype(float)


def kappa(counts: np.ndarray) -> np.ndarray:
    """Cohen's kappa of counts [..., 4].

    >>> float(kappa(np.array([40.0, 10.0, 10.0, 40.0])))
    0.6
    """
    both, only_said, only_truth, neither = np.moveaxis(counts / counts.sum(-1, keepdims=True), -1, 0)
    said, truth = both + only_said, both + only_truth
    chance = said * truth + (1 - said) * (1 - truth)
    return np.round((both + neither - chance) / (1 - chance), 12)


def auc(margin: np.ndarray, truth: np.ndarray) -> float:
    """How often a refused answer has the larger margin than one that is not; ties count half.

    >>> auc(np.array([0.9, 0.4, 0.4]), np.array([True, True, False]))
    0.75
    """
    gap = margin[truth][:, None] - margin[~truth]
    return float((np.sign(gap) / 2 + 0.5).mean())


def scores(said: np.ndarray, truth: np.ndarray, prompts: Sequence[str]) -> dict[str, Score]:
    """Kappa with its 95 % percentile interval, precision and recall of `refused`, and how often each refuses."""
    names, place = np.unique(np.asarray(prompts), return_inverse=True)
    of_prompt = np.zeros((len(names), 4))
    np.add.at(of_prompt, place, confusion(said, truth))
    generator = np.random.default_rng(crc32(b"prompts of refusal_labels"))
    drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=DRAWS) @ of_prompt
    low, high = np.quantile(sampled := kappa(drawn), (0.025, 0.975))
    both, only_said, only_truth, _ = total = of_prompt.sum(0)
    return {
        "kappa": Score(float(kappa(total)), n=len(said), standard_error=float(sampled.std(ddof=1))),
        "kappa_low": Score(float(low), n=len(said)),
        "kappa_high": Score(float(high), n=len(said)),
        "precision": Score(both / max(both + only_said, 1), n=max(int(both + only_said), 1)),
        "recall": Score(both / (both + only_truth), n=int(both + only_truth)),
        "refused": Score(float(said.mean()), n=len(said)),
    }


def learned(read: Sequence[Row], other_systems: bool, phrasings: int = 0) -> np.ndarray:
    """The margin of each answer in a logistic regression that was trained on the labels of answers to other prompts.

    All answers to a prompt are in one of `FOLDS` folds; with `other_systems` the answer's own system is left out too.
    So many of our own phrasings are trained on besides. The penalty is fixed beforehand, not chosen on any label.
    """
    x, truth, (texts, ours) = matrix([row["completion"] for row in read]), labels(read), answers(phrasings)
    ours_x, margin = matrix(texts), np.zeros(len(read))
    system = np.array([row["system"] for row in read])
    fold = np.array([crc32(row["id"].encode()) % FOLDS for row in read])
    left_out = [(s, f) for s in (SYSTEMS if other_systems else ("",)) for f in range(FOLDS)]
    for s, f in left_out:
        train = np.flatnonzero((fold != f) & (system != s))
        test = np.flatnonzero((fold == f) & ((system == s) | (not s)))
        weights = fit(vstack([x[train], ours_x]).tocsr(), [*truth[train], *ours], PENALTY)
        margin[test] = x[test] @ weights
    return margin


def labels(read: Sequence[Row]) -> np.ndarray:
    """Whether people called each answer refused."""
    return np.array([refused(row["final_label"]) for row in read])


def verdicts(read: Sequence[Row]) -> Iterator[Reading]:
    """What every instrument says."""
    exchanges = [Exchange(row["prompt"], row["completion"]) for row in read]
    shipped: tuple[Judge, ...] = (Phrases(), Scorer())
    for judge in shipped:
        given = judge.label(exchanges)
        probabilities = [label.score for label in given if label.score is not None]
        margin = np.array(probabilities) if len(probabilities) == len(given) else None
        broken = sum(label.verdict == "broken" for label in given)
        yield Reading(judge.name, judge.version, np.array([label.refused for label in given]), margin, broken)
    for name, field in (("XSTest's string match", "strmatch_label"), ("GPT-4 as judge", "gpt4_label")):
        yield Reading(name, "in the files", np.array([refused(row[field]) for row in read]))
    for title, other_systems in (("other systems", True), ("other prompts", False)):
        for tail, phrasings in (("", 0), (" + phrasings", 2 * len(read))):
            margin = learned(read, other_systems, phrasings)
            yield Reading(f"logistic, labels of {title}{tail}", "not shipped", margin > 0, margin)


def run(data: Path, ledger: Ledger) -> None:
    """Measure every instrument on every system and on all together, and append it to the ledger."""
    read = rows(data)
    truth, prompts, systems = labels(read), [row["id"] for row in read], np.array([row["system"] for row in read])
    first, second = (np.array([refused(row[f"annotation_{k}"]) for row in read]) for k in (1, 2))
    people = Reading("one person against the other", "in the files", first)
    for reading, against in [(people, second), *((reading, truth) for reading in verdicts(read))]:
        for system in (*SYSTEMS, "all"):
            at = np.flatnonzero((systems == system) | (system == "all"))
            found = scores(reading.said[at], against[at], [prompts[k] for k in at])
            if reading.margin is not None:
                found["auc"] = Score(auc(reading.margin[at], against[at]), n=len(at))
            settings = {"version": reading.version, "system": system, "broken": reading.broken}
            ledger.append(Entry("refusal_labels", reading.name, settings, 0, "test", found))
