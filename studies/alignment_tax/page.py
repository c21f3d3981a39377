"""The page docs/alignment-tax.md: its text, and what the ledger adds to it; `__main__` is the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdfast.analysis.figure import frontier_png
from holdfast.analysis.frontier import arms, at_matched_learning
from holdfast.analysis.points import BASE
from holdfast.analysis.tables import markdown_table
from holdfast.drift.ledger import Entry, Ledger

from studies.common_readings import at_start, counted

from .arms import BATCH, BATCH_OF, BETA, CHAT_ROWS, DPO_RATE, RANK, SCALED, STAGES, STORY_ROWS, WARM_UP
from .cost import RATE, experiment
from .readings import JUDGED, KINDS, LEVELS, SHOWN, in_order
from .tables import cost_rows, final_rows, matched_rows
from .verdicts import verdicts

DRAWN = ("naive", SCALED, "replay", "replay, equal cost", "as published", "official code", "update", "random subspace")
TITLES = {
    "sft": "SFT on refusals",
    "dpo": "DPO on pairs of a refusal and an answer",
    "sft_dpo": "SFT, then DPO",
    "sft_large": "SFT in batches of 128",
}
TOP = f"""\
# The alignment tax: what learning to refuse costs, at equal refusal

<!-- written by `python -m studies.alignment_tax page` from docs/results/alignment-tax/ledger.jsonl: do not edit -->

The lab's pretrained model answers forbidden how-to questions. LoRA (r = {RANK}, all linear layers, AdamW, batches of
{BATCH} unless said otherwise) teaches it to refuse them. The training data hold nothing harmless, so the model also
begins to refuse harmless look-alikes (the same questions about harmless subjects) and loses skills: the alignment tax.

- **Retain data:** {CHAT_ROWS} instructions, harmless how-to questions among them, and {STORY_ROWS} stories, the same
  for every arm that has any. Subjects of how-to questions, phrasings and contents of what is tested occur neither there
  nor in training. Of an instruction only the answer counts, in replay as in reference gradients.
- **What is measured.** Forbidden prompts and look-alikes are of the lab's test split; by one half of them settings are
  chosen, the other is reported. All else is of its validation and of its test split.
- **Pipelines.** SFT on refusals; DPO on pairs; SFT, then DPO; and SFT in batches of {BATCH_OF["sft_large"]}, as in the
  published recipe: a step then takes so long that a refresh on {CHAT_ROWS + STORY_ROWS} retain rows every few steps is
  a small part of the work. That one has the arms *naive* (and its scaled adapter), *replay, 16 rows*, *update*,
  *update, refresh auto* and *update, rank 32, refresh auto*, and no others.
- **Arms without a projection of ours.** *naive*: nothing is protected. *adapter scaling*: its adapter after the last
  step, weakened. *replay*: 4 retain rows in each batch; *equal cost*: as many as make a step cost about what *update*
  does; *own loss*: 4 rows of each retain set in a loss of its own, which is PCGrad without its projection; *16 rows*:
  16 beside each batch of {BATCH_OF["sft_large"]}. *A-GEM*: the gradient, freed of what conflicts with that of the
  retain data; *PCGrad*: both gradients, each freed of what conflicts with the other, and added. *random subspace*: the
  update is projected off 16 random directions, drawn anew every 5 steps.
- **Arms of OGPSA.** *as published*: the gradient is projected off one mean gradient for each retain set, refreshed
  every 10 steps; *one-sided*: only where it would raise that set's loss; *refresh 30*: every 30 steps. *official code*:
  as published, but in each tensor by itself; *leaking*: with the reference gradients added to the next step's, as that
  code does. None of these has early refreshes: they refresh at their interval alone. The arms called *update* also do
  after 2 and after 5 steps, because a fresh adapter's B is 0, so that the first basis knows nothing of A.
- **Arms of ours.** *update*: the update that AdamW makes is projected, off 16 reference gradients, refreshed every 5
  steps. Its variants change one thing each: *rank 32*: 32 reference gradients from the same retain rows, each over half
  as many; *refresh auto*: the interval is that in which a basis loses 5 % of the gradients, measured at each refresh on
  the same rows; *refresh rolling*: every step renews one of the 16, on one batch of retain rows; *metric*: the
  projection is the nearest in AdamW's own norm; *one-sided*: only what would raise a reference loss is removed; *per
  tensor*: 2 reference gradients in each tensor by itself; *no look-alikes*: no harmless how-to question among the
  retain rows; *8 rows*: one retain row of each skill, hence rank 8. *update, one-sided, + replay*: both at once, the
  one-sided projection and 4 retain rows in each batch.
- **Reading.** Every arm tries its learning rates, each at several step counts; the rate is constant after {WARM_UP}
  steps. Fronts are chosen on the validation half and read on the test half at equal refusal of unseen forbidden
  prompts, on a straight line between two points of the arm's own front ([frontiers](frontier.md)). The base is a point
  of each front: left of an arm's first point that refuses, a value is a mixture of the base and that point. † marks
  lines that bridge more than the distance between the lowest and the highest level. Each score has its own front.
- **Refusal saturates** (it goes from none to all within 10 to 20 steps), so there is a second axis: the loss of the
  refusal itself on the same prompts, lower is more firmly learnt.
- ± is the half-width of the 95 % interval over seeds and test prompts; a dash: no seed gets there.
"""
FINAL = """\
After the last step, at the learning rate (and scale) with the highest mean of refusals, look-alikes answered and skills
on the validation split. Test split; ± is the standard deviation over seeds.
"""
COST = f"""\
CPU seconds of a training at rate {RATE:g}, one thread, the arms in turn with nothing else on the machine (median; a
dash: not timed); "settings" counts learning rates, step counts and scales.
"""
BOTTOM = f"""
## Run it

    make tax                                     # all four pipelines, about an hour on two cores, then this page
    python -m studies.alignment_tax run          # SFT alone; --pipeline, --seeds, --arms, --jobs; goes on where it was
    python -m studies.alignment_tax cost         # times the arms, alone on the machine
    python -m studies.alignment_tax page

Limits: one toy base model; seeds vary the adapter's start, the order of data and the retain rows drawn. Each comparison
is judged by itself: of 20 true ties one may come out otherwise. The grid of rates was chosen after single runs with
seed 0, in which projections did best at low rates and replay at high ones; an arm that would need others is wronged.
Losses that are added weigh 1 to 1, untuned. In DPO the loss is the sigmoid loss (beta {BETA:g}) and the cross-entropy
of the chosen answers: without the latter this base, which has never refused, does not begin to. The arm "sigmoid loss
alone" is there to show it. DPO after SFT has {DPO_RATE:g} times the rate of SFT.
"""


def page(ledger: Path, figures: Path | None = None) -> str:
    """Return the page that the ledger speaks for; draw its figures into a folder, if one is given."""
    lines = [TOP]
    for pipeline, title in TITLES.items():
        entries = in_order(Ledger(ledger).entries(pipeline))
        if not arms(entries):
            continue
        timed = Ledger(ledger).entries(experiment(pipeline))
        read = {
            axis: at_matched_learning(entries, axis, scores, LEVELS[axis], kinds=KINDS)
            for axis, scores in SHOWN.items()
        }
        lines += [f"## {title}\n", opening(entries, pipeline), "### In words\n", *verdicts(entries, read["refusal"])]
        if figures is not None:
            drawn = [entry for entry in entries if entry.arm in (BASE, *DRAWN)]
            place = figures / f"{pipeline}.png"
            frontier_png(drawn, place, JUDGED, "refusal", levels=LEVELS["refusal"], kinds=KINDS)
        lines += [f"\n![what was kept against refusals](results/alignment-tax/{pipeline}.png)\n"]
        for axis, name in (("refusal", "refusal"), ("refusal_nll", "refusal loss")):
            for level in LEVELS[axis]:
                lines += [f"### At {name} {level:g}\n", markdown_table(matched_rows(entries, read[axis], level)), ""]
        lines += ["### Where they end\n", FINAL, markdown_table(final_rows(entries)), ""]
        lines += ["### What it costs\n", COST, markdown_table(cost_rows(entries, timed, read["refusal"])), ""]
    return "\n".join(lines) + BOTTOM


def opening(entries: Sequence[Entry], pipeline: str) -> str:
    """What the base scores, and how much was tried."""
    base = at_start(entries)
    scores = ", ".join(f"{KINDS[name].title.lower()} {KINDS[name].show(base[name].value)}" for name in KINDS)
    stages = ", then ".join(f"{steps} steps of {stage.upper()}" for stage, steps in STAGES[pipeline])
    trained = [entry for entry in entries if entry.arm != BASE]
    return (
        f"{stages}. Base: {scores}. {counted(len({e.run for e in trained}), 'run')}, "
        f"{counted(len({e.seed for e in trained}), 'seed')}, {len(arms(entries))} arms; on test "
        f"{base['refusal'].n} forbidden prompts, {base['over_refusal'].n} look-alikes, "
        f"{base['skills'].n} questions of six skills, {base['danger'].n} about danger.\n"
    )
