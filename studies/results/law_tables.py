"""The tables of the page on the law of forgetting: losses, parameters, forms, expectations; read `law_words`."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.analysis.extrapolation import LAST_SEEN
from holdfast.analysis.fit_pairs import Difference

from studies.common_readings import at_start, within

from .columns import Column
from .comparisons import KINDS, PLAIN
from .law_fits import FACTOR, FORMS, Laws, amounts, measured, middle, nearest

MARKS = {"less": "✓ ", "more": "✗ "}


def middle_of(found: Sequence[Laws]) -> tuple[float, float]:
    """D and N at which arms are compared."""
    return next(middle(one.fits[PLAIN]) for one in found if PLAIN in one.fits)


def shown(one: Difference | None) -> str:
    """A difference of forgetting, with its interval and mark."""
    return "" if one is None else f"{MARKS.get(one.verdict, '')}{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"


def learned_rows(each: Column, found: Sequence[Laws]) -> list[dict[str, str]]:
    """For each arm the task loss, and how much of every score is forgotten, after so many steps."""
    base, rows = at_start(each.entries), []
    for arm in each.arms:
        for score in (each.learnt, *(one.score for one in found)):
            start = 0.0 if score == each.learnt else base[score].value
            row = {"arm": arm, "": within(KINDS[score].title) + " forgotten" * (score != each.learnt)}
            row |= {f"{data:g}": f"{measured(each.entries, arm, score, data) - start:.3f}" for data in amounts(each)}
            rows.append(row)
    return rows


def parameter_rows(each: Column, one: Laws) -> list[dict[str, str]]:
    """For each arm the law's parameters, its forgetting in the middle of the data, and what is learned there."""
    rows = []
    for arm, found in one.fits.items():
        data, size = middle(found)
        row = {"arm": arm}
        for name in found.law.names:
            told = name in found.parameters
            ends = " to ".join(f"{end:.2g}" for end in found.intervals[name]) if told else ""
            row[name] = f"{found.parameters[name]:.2g} ({ends})" if told else "not told"
        expected = found.predict(data, size)
        low, high = (end - (expected.base or 0.0) for end in expected.interval)
        row["residual"] = f"{100 * found.residual:.0f} %"
        row["forgetting"] = f"{expected.loss - (expected.base or 0.0):.3f} [{low:.3f}, {high:.3f}]"
        row[f"minus {PLAIN}"] = shown(one.against(arm)) if arm != PLAIN else ""
        row["task loss"] = f"{measured(each.entries, arm, each.learnt, nearest(each, data)):.3f}"
        rows.append(row)
    return rows


def form_rows(found: Sequence[Laws]) -> list[dict[str, str]]:
    """For each score and arm the held-out error of every form, beside the two marks."""
    rows = []
    for one in found:
        for arm, forms in one.forms.items():
            if isinstance(forms, str):
                continue
            errors = {each.law: each for each in forms}
            best = min((each.error, name) for name, each in errors.items() if each.error == each.error)[1]
            row = {"score": within(KINDS[one.score].title), "arm": arm}
            for name in (*(law.name for law in FORMS if law.name in errors), LAST_SEEN):
                text = f"{100 * errors[name].error:.0f} %" if not errors[name].why else "–"
                row[name] = f"**{text}**" if name == best else text
            rows.append(row | {"noise": f"{100 * forms[0].noise:.0f} %"})
    return rows


def expected_rows(each: Column, found: Sequence[Laws]) -> list[dict[str, str]]:
    """For each arm what is expected at `FACTOR` times the most data, in the middle of the ranks."""
    rows = []
    for arm in each.arms:
        row = {"arm": arm}
        for one in found:
            row[within(KINDS[one.score].title)] = "–"
            if arm in one.fits:
                fitted = one.fits[arm]
                told = fitted.predict(FACTOR * float(fitted.points.data.max()), middle(fitted)[1])
                base = told.base or 0.0
                (low, high), (least, most) = ([end - base for end in ends] for ends in (told.interval, told.run))
                row[within(KINDS[one.score].title)] = (
                    f"{told.loss - base:.2f}, {low:.2f} to {high:.2f} ({least:.2f} to {most:.2f})"
                )
        rows.append(row)
    return rows
