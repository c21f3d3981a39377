"""Tables of the page: what drifted, what the gates say, what two evaluations share; every figure from the ledger."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.analysis.paired import Drift
from holdfast.analysis.rates import wilson
from holdfast.drift.ledger import Entry

from .comparison import LEVEL, Comparison, is_kl
from .false_alarms import bar
from .measuring import BASE, SENTENCE

Table = list[dict[str, object]]
INSTRUMENTS = {
    "the taught sentence": (SENTENCE, f"over_{SENTENCE}"),
    "scorer": ("refusal", "over_refusal"),
    "phrases": ("refusal.phrases", "over_refusal.phrases"),
}


def drift_rows(of: Comparison) -> Table:
    """A row for each score: the base, and of each seed the drift with its interval; bold beyond noise (Holm)."""
    rows: Table = []
    for name, kind in of.kinds.items():
        first = of.base.scores[name]
        each = {f"drift, seed {e.seed}": cell(found[name]) for e, found in zip(of.tuned, of.moves, strict=True)}
        rows.append({"score": f"`{name}`", "n": first.n, "base": kind.show(first.value), **each})
    return rows


def cell(one: Drift) -> str:
    """The drift with its interval; bold where its corrected p is below the level."""
    low, high = one.interval
    if one.change.value == low == high == 0:
        return "0 exactly"
    text = f"{one.change.value:+.3g} [{low:+.3g}, {high:+.3g}]"
    return f"**{text}**" if one.adjusted < LEVEL else text


def gate_rows(named: Sequence[Comparison]) -> Table:
    """A row for each tuning and seed: the verdict, and which budgets fail."""
    rows: Table = []
    for of in named:
        for entry, found in zip(of.tuned, of.judged, strict=True):
            failed = ", ".join(f"`{one.budget.name}`" for one in found.verdicts if one.outcome == "fail")
            rows.append(
                {"tuning": of.tuning.title, "seed": entry.seed, "gate": "passes" if found.passed else "**fails**"}
                | {what: found.count(what) for what in ("pass", "undecided", "fail")}
                | {"budgets exceeded": failed or "none"}
            )
    return rows


def identical_rows(named: Sequence[Comparison]) -> Table:
    """How far an adapter that changes nothing moved any item, and the largest divergence of any."""
    rows: Table = []
    for of in named:
        before, after = of.base.scores, of.tuned[0].scores
        gaps = [
            abs(one - other)
            for name, score in before.items()
            for one, other in zip(score.items or (), after[name].items or (), strict=True)
        ]
        divergences = [item for name, score in after.items() if is_kl(name) for item in score.items or ()]
        equal = sum(score.value == after[name].value for name, score in before.items())
        rows.append(
            {"base": of.tuning.base, "scores": len(before), "of equal value": equal, "items": len(gaps)}
            | {"largest move of an item": f"{max(gaps):g}", "largest KL of an item": f"{max(divergences):g}"}
        )
    return rows


def instrument_rows(of: Comparison) -> Table:
    """What each instrument says of base and tuned: the share of answers that refuse, harmful and harmless prompts."""
    return [
        {"instrument": title, "prompts": asked, "base": share(of.base, name)}
        | {f"seed {entry.seed}": share(entry, name) for entry in of.tuned}
        for title, names in INSTRUMENTS.items()
        for name, asked in zip(names, ("harmful", "harmless"), strict=True)
    ]


def share(entry: Entry, name: str) -> str:
    """A rate with Wilson's interval."""
    score = entry.scores[name]
    n = score.n or 0
    low, high = wilson(round(score.value * n), n)
    return f"{score.value:.3f} [{low:.3f}, {high:.3f}]"


def null_rows(entries: Sequence[Entry]) -> Table:
    """Two evaluations of one adapter: the digests of all their scores."""
    rows: Table = []
    for title in dict.fromkeys(str(entry.settings["adapter"]) for entry in entries):
        one, other = (entry for entry in entries if entry.settings["adapter"] == title)
        for side in (BASE, "tuned"):
            first, second = (str(entry.settings[side]) for entry in (one, other))
            measured = one.scores["scores"]
            rows.append(
                {"adapter": title, "side": side, "scores": int(measured.value), "items": measured.n}
                | {"as it is": f"`{first[:16]}`", "shuffled, other batches": f"`{second[:16]}`"}
                | {"byte-equal": "yes" if first == second else "**no**"}
            )
    return rows


def alarm_rows(entries: Sequence[Entry]) -> Table:
    """Of each gate, how many of the draws without drift failed, beside the exact binomial bar."""
    rows: Table = []
    for entry in entries:
        n, level = entry.scores["failed"].n or 0, float(str(entry.settings["level"]))
        failed, most = round(entry.scores["failed"].value * n), bar(n, level)
        rows.append(
            {"items of": entry.settings["items"], "gate": entry.arm}
            | {"its scores, those that differ": f"{entry.settings['scores']}, {entry.settings['scores that differ']}"}
            | {"draws": n, "failed": failed}
            | {"rate [95 %]": share(entry, "failed"), "at most": most}
            | {"verdict": "within" if failed <= most else "**beyond**"}
        )
    return rows


def speed_rows(entries: Sequence[Entry]) -> Table:
    """Seconds of each evaluation, and the load that the machine had."""
    return [
        {"evaluation": entry.settings["repeat"], "CPU s": f"{entry.cost['cpu_seconds']:.1f}"}
        | {
            "wall s": f"{entry.cost['wall_seconds']:.1f}",
            "whole process, wall s": f"{entry.cost['process_seconds']:.1f}",
        }
        | {"load (1 min) before / after": f"{entry.settings['load_before']} / {entry.settings['load_after']}"}
        for entry in entries
    ]
