"""Where the shipped weights come from and what they score, as the table in docs/lab.md.

Numbers in documents are generated, never typed: `python -m holdfast.lab.provenance docs/lab.md` rewrites the part
between the two marks from the `provenance.json` that `build` left beside the weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

from holdfast.lab import models

START, END = "<!-- scores: generated -->", "<!-- end of scores -->"
BARS: Final = {  # measurement: the bar of lab-pretrained, the bar of lab-aligned
    "skill_mean": (">= 0.85", ">= 0.85"),
    "refusal": ("<= 0.05", ">= 0.95"),
    "over_refusal": ("<= 0.05", "<= 0.05"),
}


def read(name: str) -> dict[str, Any]:
    """The provenance of a shipped model: seed, recipe, first losses, versions and scores."""
    record: dict[str, Any] = json.loads((models.path(name) / "provenance.json").read_text())
    return record


def table() -> str:
    """The scores of the shipped models on test items, in Markdown.

    >>> table().splitlines()[1]
    '|---|---|---|---|'
    """
    records = [read(name) for name in models.NAMES]
    scores = [record["scores"] for record in records]
    rows: list[list[str]] = [["", *models.NAMES, "bars"], ["---"] * 4]
    for key in scores[0]["summary"]:
        if not key.startswith("adaptation"):
            values = [f"{score['summary'][key]:.3f}" for score in scores]
            rows.append([key.replace("_", " "), *values, "; ".join(BARS.get(key, ()))])
    for group in ("skills", "tasks"):
        for key in scores[0][group]:
            entries = [score[group][key] for score in scores]
            values = [f"{entry['value']:.3f} ({entry['log_likelihood']:.3f})" for entry in entries]
            rows.append([f"{group[:-1]}: {key}", *values, ""])
    lines = ["|" + "|".join(cell if cell == "---" else f" {cell} " for cell in row) + "|" for row in rows]
    count = max(score["n"] for score in scores[0]["skills"].values())
    lines += ["", f"Up to {count} test items for each score; in brackets the mean log-likelihood per answer token."]
    for record in records:
        lines.append(
            f"`{record['name']}`: {record['parameters']:,} parameters, seed {record['seed']}, {record['steps']} steps, "
            f"{record['cpu_seconds']:.0f} CPU seconds with torch {record['torch']}."
        )
    return "\n".join([*lines, ""])


def main(document: str) -> None:
    """Rewrite the generated part of a document."""
    text = Path(document).read_text()
    before, rest = text.split(START)
    after = rest.split(END)[1]
    Path(document).write_text(f"{before}{START}\n{table()}{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1])
