"""The command line of the study and its page; read the package's own docstring for how it is used."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from holdfast.analysis.tables import markdown_table
from holdfast.drift.ledger import Entry, Ledger

from studies import refusal_labels

from .measure import DRAWS, FOLDS, SYSTEMS, run

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "refusal"
WORDS = """\
# Refusal detection against people

<!-- written by `python -m studies.refusal_labels page` from ledger.jsonl: do not edit -->

{n} answers of three systems to {prompts} prompts of XSTest, each labelled by people. *Refused* is a full or partial
refusal; Cohen's kappa is computed on refused against not, with 95 % intervals of a bootstrap over prompts ({draws}
draws). What each instrument is, and what the labels mean: [refusal.md](../../refusal.md). `{command}` measures again.

## Kappa
{kappas}

- *phrases* and *scorer* are what holdfast ships. Neither was trained on a labelled answer. While they were written, the
  errors on {seen} were read and settings chosen by its kappa; of the two others only scores were seen, by which the
  last mixture of phrasings (about a dozen were tried) was chosen too.
- *logistic*: the scorer's features and fit, trained on the labels themselves; reported, not shipped. *labels of other
  prompts*: within the files, {folds} folds of prompts, all answers to a prompt in one fold. *labels of other systems*:
  the system tested is left out of training as well as the prompts. *+ phrasings*: with answers of our own besides.
- *XSTest's string match* and *GPT-4 as judge* are labels that come with the data.
- No judge model is measured here: none can be downloaded where this page is made.

## In words
{verdicts}

## Precision and recall of *refused*; ranking
{precisions}

AUC is how often a refused answer gets a larger score than one that is not, whatever the threshold; the least of the
three systems. A high AUC beside a low kappa means that the threshold, not the ranking, does not carry over.

{broken}
"""


def cell(entry: Entry) -> str:
    """Kappa with its interval."""
    at = entry.scores
    return f"{at['kappa'].value:.2f} [{at['kappa_low'].value:.2f}, {at['kappa_high'].value:.2f}]"


def verdicts(of: dict[str, dict[str, Entry]]) -> list[str]:
    """Were the two aims reached?"""
    lines = []
    unseen = "logistic, labels of other systems"
    aims = [("scorer", 0.70, "on systems that it was never trained on"), (unseen, 0.70, "on the system left out")]
    aims += [(f"{unseen} + phrasings", 0.70, "on the system left out")]
    aims += [("logistic, labels of other prompts", 0.85, "within the files"), ("scorer", 0.85, "within the files")]
    aims += [("logistic, labels of other prompts + phrasings", 0.85, "within the files")]
    for name, aim, where in aims:
        systems = [of[name][system] for system in SYSTEMS] if aim == 0.70 else [of[name]["all"]]
        least = min(entry.scores["kappa"].value for entry in systems)
        low = min(entry.scores["kappa_low"].value for entry in systems)
        reached = "reached" if least >= aim else "missed"
        sure = "the whole interval is above it" if low >= aim else "the interval reaches below it"
        tail = f", {sure}" if reached == "reached" else ""
        least_word = "least kappa" if aim == 0.70 else "kappa"
        lines.append(f"- *{name}* {where}: {least_word} {least:.2f}, aim {aim:.2f} {reached}{tail}.")
    return lines


def page(entries: Sequence[Entry]) -> str:
    """The page as Markdown."""
    of: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        of.setdefault(entry.arm, {})[str(entry.settings["system"])] = entry
    titles = {**SYSTEMS, "all": "all"}
    kappas = [
        {"instrument": name, "version": rows["all"].settings["version"]}
        | {title: cell(rows[system]) for system, title in titles.items()}
        for name, rows in of.items()
    ]
    precisions = [
        {"instrument": name}
        | {
            title: f"{rows[s].scores['precision'].value:.2f} / {rows[s].scores['recall'].value:.2f}"
            for s, title in titles.items()
        }
        | {"AUC": f"{min(rows[s].scores['auc'].value for s in SYSTEMS):.3f}" if "auc" in rows["all"].scores else ""}
        for name, rows in of.items()
    ]
    some = of["scorer"]
    return WORDS.format(
        n=some["all"].scores["kappa"].n, prompts=some["gpt4"].scores["kappa"].n, draws=DRAWS, folds=FOLDS,
        command="HOLDFAST_DATA=... python -m studies.refusal_labels run", seen=SYSTEMS["llama2orig"],
        kappas=markdown_table(kappas), verdicts="\n".join(verdicts(of)), precisions=markdown_table(precisions),
        broken=f"Called broken, of {some['all'].scores['kappa'].n}: {some['all'].settings['broken']}.",
    )  # fmt: skip


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.refusal_labels",
        description=refusal_labels.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=("run", "page"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.verb == "run":
        data = Path(os.environ.get("HOLDFAST_DATA", ""))
        if not (data / "refusal_labels").is_dir():
            parser.error("HOLDFAST_DATA must name the folder with refusal_labels/: the answers are not in the project")
        with tempfile.TemporaryDirectory() as folder:  # a run that is killed leaves the published ledger as it was
            run(data, Ledger(Path(folder) / "ledger.jsonl"))
            args.results.mkdir(parents=True, exist_ok=True)
            (args.results / "ledger.jsonl").write_bytes((Path(folder) / "ledger.jsonl").read_bytes())
    written = page(Ledger(args.results / "ledger.jsonl").entries("refusal_labels"))
    (args.results / "README.md").write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
