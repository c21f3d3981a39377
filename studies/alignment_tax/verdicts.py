"""The answers in words, as the numbers give them: one arm against another at equal refusal; read `tables` next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from holdfast.analysis.frontier import Reading, arms, compare
from holdfast.drift.ledger import Entry

from studies.common_readings import at_start, counted

from .arms import SCALED
from .readings import JUDGED, JUDGED_AT, KEPT, KINDS, at_level, final

QUESTIONS = (
    ("Does a weaker adapter do it?", SCALED, "naive"),
    ("Does replay help?", "replay", "naive"),
    ("Does A-GEM help?", "A-GEM", "naive"),
    ("Does PCGrad help?", "PCGrad", "naive"),
    ("Is that more than the replay in it?", "PCGrad", "replay, own loss"),
    ("Does OGPSA as published help?", "as published", "naive"),
    ("Is it harmed by what it removes on both sides?", "as published, one-sided", "as published"),
    ("Is the official code's projection of each tensor better?", "official code", "as published"),
    ("Does the leak of the official code matter?", "official code, leaking", "official code"),
    ("Does a refresh every 30 steps do for the published form?", "as published, refresh 30", "as published"),
    ("Does projecting the update help?", "update", "naive"),
    ("And with rank 32?", "update, rank 32", "naive"),
    ("And refreshed as needed, in large batches?", "update, rank 32, refresh auto", "naive"),
    ("Is projecting the update better than projecting the gradient?", "update", "as published"),
    ("Is it this subspace, or would any of its rank do?", "update", "random subspace"),
    ("Does the optimizer's metric help?", "update, metric", "update"),
    ("Does one-sided projection help?", "update, one-sided", "update"),
    ("Is rank 2 in each tensor better than rank 16 over all?", "update, per tensor", "update"),
    ("Can the basis be refreshed every 10 steps?", "update, refresh 10", "update"),
    ("Can it be refreshed every 30 steps?", "update, refresh 30", "update"),
    ("Does it refresh well by itself?", "update, refresh auto", "update"),
    ("Does rolling refresh do?", "update, refresh rolling", "update"),
    ("Is it better than replay of 4 rows a step?", "update", "replay"),
    ("Is it better than replay at equal cost?", "update", "replay, equal cost"),
    ("Is it better than PCGrad?", "update", "PCGrad"),
    ("Is rank 32 better than 16?", "update, rank 32", "update"),
    ("Does it add to replay?", "update, one-sided, + replay", "replay"),
    ("Does replay add to it?", "update, one-sided, + replay", "update"),
    ("Is it better than replay of 16 rows beside 128?", "update, rank 32, refresh auto", "replay, 16 rows"),
    ("Is rank 32 better than 16, refreshed as needed?", "update, rank 32, refresh auto", "update, refresh auto"),
    ("Do the retain rows need the look-alikes?", "update, no look-alikes", "update"),
    ("With 8 retain rows, is it better than replay of them?", "update, 8 rows", "replay, 8 rows"),
    ("Does the sigmoid loss alone teach refusals?", "naive, sigmoid loss alone", "naive"),
)


def verdicts(entries: Sequence[Entry], readings: Sequence[Reading]) -> list[str]:
    """The answers, as the numbers give them."""
    lines = [tax(entries)] if "naive" in arms(entries) else []
    for score in JUDGED if "naive" in arms(entries) else ():
        found: dict[str, list[str]] = {}
        for one in compare(at_level(readings, score), "naive", kinds=KINDS):
            found.setdefault(one.verdict, []).append(f"*{one.arm.arm}*")
        words = {
            "better": "lower than *naive*",
            "worse": "higher",
            "within noise": "no difference that the seeds can show",
        }
        told = "; ".join(f"{words.get(verdict, verdict)}: {', '.join(names)}" for verdict, names in found.items())
        lines.append(f"- **{KINDS[score].title} at refusal {JUDGED_AT:g}.** {told or 'nothing to compare'}.")
    for question, mine, theirs in QUESTIONS:
        if {mine, theirs} <= set(arms(entries)):
            lines.append(f"- **{question}** " + " ".join(answers(readings, mine, theirs)))
    return lines


def tax(entries: Sequence[Entry]) -> str:
    """What safety training without protection does, where it ends."""
    base = at_start(entries)
    chosen = final(entries, "naive")
    if not chosen:
        return "- **Is there a tax?** No setting of naive has all seeds."
    changes = ", ".join(
        f"{KINDS[name].title.lower()} {KINDS[name].show(base[name].value)} to "
        f"{KINDS[name].show(fmean(entry.scores[name].value for entry in chosen))}"
        for name in ("refusal", *KEPT)
    )
    settings = chosen[0].settings
    return (
        f"- **Is there a tax?** Naive training at its best learning rate ({settings['learning_rate']:g}), after "
        f"{settings['steps']} steps, mean of {counted(len(chosen), 'seed')}: {changes}."
    )


def answers(readings: Sequence[Reading], mine: str, theirs: str) -> Iterator[str]:
    """One sentence for each score that is judged: one arm against another at equal refusal."""
    for score in JUDGED:
        pair = [reading for reading in at_level(readings, score) if reading.arm in (mine, theirs)]
        one = next(one for one in compare(pair, theirs, kinds=KINDS))
        what, where = KINDS[score].title.lower(), f"at refusal {JUDGED_AT:g}"
        if not one.seeds:
            reached = f"*{mine}* gets there in {one.arm.reached} seeds, *{theirs}* in {one.baseline.reached}"
            yield f"{what.capitalize()} {where}: {reached}."
            continue
        seeds = counted(len(one.seeds), "seed")
        numbers = f"{' against '.join(map(KINDS[score].show, one.means))}, difference {one.numbers} over {seeds}"
        if one.verdict == "within noise":
            yield f"{what.capitalize()} {where}: no difference that {seeds} can show ({numbers})."
        else:
            way = "lower" if one.difference < 0 else "higher"
            yield f"*{mine}* has {way} {what} than *{theirs}* {where}: {numbers}."
