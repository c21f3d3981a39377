"""The page docs/results/law.md: does a method flatten the law of forgetting, or does it only learn more slowly?

    python -m studies.results.law_page [--work FOLDER]     # publishes the comparison's ledger, writes page and figures

Read `law_fits`, what is computed, and `law_words`, how it is told, next.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.analysis.fit_figure import fit_png
from holdfast.analysis.scaling_law import Law
from holdfast.analysis.tables import markdown_table
from holdfast.drift.ledger import Ledger

from studies.common_readings import within

from .columns import Column, column
from .comparisons import KINDS, PLAIN, RESULTS, commands
from .law_fits import FACTOR, FORMS, Laws, laws
from .law_tables import expected_rows, form_rows, learned_rows, middle_of, parameter_rows
from .law_words import claimed, drawn_by_runs, refusals, verdicts
from .runs import WORK, lean, write
from .sheet import Sheet, draw
from .tables import KEY, kept_table, numbers_table, opening

NAME = "law"
SCORES = ("stories_loss", "skills_loss", "refusals_loss")
CLAIM = """\
AlignGuard-LoRA (arXiv 2508.02079) describes forgetting by L = L0 + A·D^β/N^α + E, after Bethune et al. (2025, arXiv
2502.06042), whose law has no E, and reports a lower A and a lower residual E than plain fine-tuning: the law is said
to be *flattened*. Its text and fitted values could not be had; nothing here reproduces them."""
SETUP = """\
The lab's aligned model learns *shift* (rotate letters; answer in a new format) with LoRA on all linear layers: alpha
= 16, batches of 16, a constant rate of 0.004. Every run is measured on its way: D is the number of steps, N the rank
of the adapter. L is the loss of what should be kept, in nats per token: stories, skills, refusals of unseen forbidden
prompts. The *paper form* has AlignGuard-LoRA's four terms at their given strengths ([how it is
followed](../alignguard.md)); *TMKL* has strength 0.3; *OGPSA* projects gradients, refreshed every 20 steps. Recipe:
`recipes/results/law.yaml`."""
FITTED = """\
Each law is fitted to all runs of an arm, in log L. Checkpoints of a run share its noise, and runs of a seed share
the order of their data; so intervals (95 %) draw whole seeds, the same draws for every arm, and differences are
paired ([how](../scaling-law.md)). A is forgetting at one step and rank 1, where nothing was measured, and goes up
and down with β and E: two arms are compared by *forgetting*, their laws' values in the middle of the data, D =
{data:g} steps and N = {size:g}; the verdicts above are of what was measured there, which no form bends. ✓ and ✗:
less and more than *{plain}* beyond noise. *Task loss* is measured, at the amount of data that is nearest to the
middle. *Residual*: how far runs lie from the law."""
FORETOLD = """\
Error of the loss at the {held} largest amounts of data, foretold by each form fitted on the rest; *last seen*: the loss
at the largest amount of the rest, which a law must beat to be of use; *noise*: how far runs lie from their own mean."""
LIMITS = """\
One small model of ours, one task of it, three seeds, one rate and one strength for each arm: an arm that would need
another is wronged, and a lower rate would shift every law. D is steps within a run at a constant rate, not runs that
each end at their own D. N is the rank of an adapter (alpha is the same, so that a larger rank is scaled down), not
the size of a model: α says nothing of larger models. E cannot be forgetting that is there before any step; it
describes the amounts of data that were measured. Test rows are the same in all runs: what other rows would change is
in the intervals at equal learning, not in those of the laws. Scores and levels of one run are no independent
witnesses."""


@dataclass(frozen=True)
class LawSheet(Sheet):
    """A page with a part of its own: the laws, before the comparison at equal learning."""

    laws: str = ""

    def text(self) -> str:
        """The page as Markdown."""
        heading = "## Result at matched learning\n"
        return super().text().replace(heading, f"## The laws: at equal data\n\n{self.laws}\n\n{heading}", 1)


def sheet(results: Path, figures: bool = True, draws: int = 200, forms: Sequence[Law] = FORMS) -> LawSheet | None:
    """The page, from docs/results/law/ledger.jsonl; None where nothing was run, or one seed only.

    Args:
        results: the folder with the ledgers, where figures go too.
        figures: whether they are drawn.
        draws: of the bootstrap.
        forms: of the law that are compared by what they foretell.
    """
    each = column(results, NAME)
    if each is None or len(each.seeds) < 2:
        return None
    found = [laws(each, score, draws=draws, forms=forms) for score in SCORES]
    by_runs = [laws(each, score, "runs", draws, ()) for score in SCORES]
    if figures:
        story = found[0]
        fit_png(story.fits, results / NAME / "law.png", within(KINDS[story.score].title), "steps", "rank", 1.0)
        draw(each, each.arms, [*SCORES], results / NAME / "frontier.png")
    return LawSheet(
        "Does a method flatten the law of forgetting?", NAME, "docs/results/law/ledger.jsonl", CLAIM,
        verdicts(each, found), f"{SETUP}\n\n{opening(each)}", matched(each), drawn_by_runs(each, found, by_runs),
        LIMITS, commands(NAME), laws=told(each, found),
    )  # fmt: skip


def told(each: Column, found: list[Laws]) -> str:
    """The laws of every score with what was learned beside them, how forms foretell, what is expected and refused."""
    data, size = middle_of(found)
    parts = [FITTED.format(data=data, size=size, plain=PLAIN), "\n![story loss against steps](law/law.png)\n"]
    parts += ["### What was measured: forgetting, and the task loss beside it\n"]
    parts += ["Means over ranks and seeds, after so many steps; forgetting is above the base's loss.\n"]
    parts += [markdown_table(learned_rows(each, found)), ""]
    for one in found:
        parts += [f"### The law of {within(KINDS[one.score].title)}\n", markdown_table(parameter_rows(each, one)), ""]
    parts += ["### A and E, which are said to be lower\n", claimed(each, found), ""]
    parts += [
        "### Which form foretells\n",
        FORETOLD.format(held=held_out(found)),
        "",
        markdown_table(form_rows(found)),
        "",
    ]
    parts += [f"### Expected at {FACTOR:g} times the data\n"]
    parts += ["Forgetting, with the interval of the mean; in brackets that of one run. A guess about the form.\n"]
    parts += [markdown_table(expected_rows(each, found)), "", "### What the fits refuse or doubt\n", refusals(found)]
    return "\n".join(parts)


def held_out(found: list[Laws]) -> int:
    """How many of the largest amounts of data the forms had to foretell."""
    for one in found:
        for arm, forms in one.forms.items():
            if not isinstance(forms, str):
                data = one.fits[arm].points.data
                return len({value for value in data.tolist() if value > forms[0].cut})
    return 0


def matched(each: Column) -> str:
    """At equal learning: does it still look flatter?"""
    parts = ["![what was kept, by task loss](law/frontier.png)\n", f"### At task loss {each.levels[1]:g}\n"]
    parts += [KEY.format(theirs=PLAIN), kept_table(each, PLAIN)]
    for arm in each.arms:
        if arm != PLAIN:
            parts += [f"\n### {arm} against {PLAIN}, in numbers\n", numbers_table(each, arm, PLAIN)]
    return "\n".join(parts)


def main() -> None:
    """Publish the ledger and write the page."""
    parser = argparse.ArgumentParser(prog="python -m studies.results.law_page", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(), help="the folder in which runs/ lies; this one")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the page goes")
    parser.add_argument("--draws", type=int, default=200, help="of the bootstrap")
    asked = parser.parse_args()
    run = Ledger(asked.work / WORK / NAME / "ledger.jsonl")
    if entries := lean(run.entries(NAME, status=None), NAME):
        write(entries, asked.results / NAME / "ledger.jsonl")
    made = sheet(asked.results, draws=asked.draws)
    if made is None:
        print("law: no page yet: it takes two seeds of `python -m studies.results run law`")
        return
    path = asked.results / f"{NAME}.md"
    path.write_text(made.text(), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
