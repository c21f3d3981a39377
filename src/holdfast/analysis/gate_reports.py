"""A gate's verdicts as JUnit XML, JSON and GitHub-flavoured Markdown. Read next: docs/gate.md, which shows each."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from xml.etree import ElementTree

from holdfast.analysis.budgets import shown
from holdfast.analysis.evidence import Flips
from holdfast.analysis.gate import Judgement, Outcome, Verdict
from holdfast.analysis.paired import LEAST
from holdfast.analysis.rates import Interval
from holdfast.drift.ledger import JSON

SIGNS: Mapping[Outcome, str] = {"pass": "✅", "fail": "❌", "undecided": "❔"}


def as_json(found: Judgement) -> str:
    """The judgement as JSON; a bound that is not known, and a change that divides by zero, is null.

    >>> from holdfast.analysis.budgets import Gate
    >>> json.loads(as_json(Judgement(Gate(()), (), {})))["passed"]
    True
    """
    gate = found.gate
    record: dict[str, JSON] = {
        "passed": found.passed,
        "level": gate.level,
        "correction": gate.correction,
        "strict": gate.strict,
        "budgets": [_record(verdict) for verdict in found.verdicts],
        "too_few_items": dict(found.too_few),
    }
    return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _record(verdict: Verdict) -> dict[str, JSON]:
    budget, move = verdict.budget, verdict.change
    return {
        "score": budget.score,
        "category": budget.category,
        "side": budget.side,
        "limit": budget.limit,
        "relative": budget.relative,
        "outcome": verdict.outcome,
        "why": verdict.why,
        "base": _finite(verdict.base),
        "tuned": _finite(verdict.tuned),
        "drift": _finite(move.value),
        "interval": [_finite(bound) for bound in verdict.interval],
        "confidence": verdict.confidence,
        "p": verdict.p,
        "n": move.n,
        "method": move.how,
        **({"lost": move.lost, "gained": move.gained} if isinstance(move, Flips) else {}),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def as_junit(found: Judgement, name: str = "holdfast gate") -> str:
    """The judgement as JUnit XML: a test case a budget; undecided is skipped, or a failure where the gate is strict.

    >>> from holdfast.analysis.budgets import Gate
    >>> as_junit(Judgement(Gate(()), (), {})).splitlines()[1]
    '<testsuites name="holdfast gate" tests="0" failures="0" skipped="0">'
    """
    failures = sum(verdict.outcome in found.failing for verdict in found.verdicts)
    skipped = 0 if found.gate.strict else found.count("undecided")
    counts = {"tests": str(len(found.verdicts)), "failures": str(failures), "skipped": str(skipped)}
    root = ElementTree.Element("testsuites", {"name": _xml(name), **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": _xml(name), **counts, "errors": "0"})
    for verdict in found.verdicts:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": _xml(f"gate.{verdict.budget.score}"), "name": _xml(str(verdict.budget))}
        )
        if verdict.outcome in found.failing:
            failed = ElementTree.SubElement(case, "failure", {"message": _xml(verdict.why), "type": verdict.outcome})
            failed.text = _xml(verdict.why)
        elif verdict.outcome == "undecided":
            ElementTree.SubElement(case, "skipped", {"message": _xml(f"undecided: {verdict.why}")})
        else:
            ElementTree.SubElement(case, "system-out").text = _xml(verdict.why)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _xml(text: str) -> str:
    """XML 1.0 has no control characters, not even escaped."""
    return re.sub(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]", "\N{REPLACEMENT CHARACTER}", text)


def as_markdown(found: Judgement) -> str:
    """The judgement as Markdown for a pull request: the verdict, a row a budget, the worst first, what was not judged.

    >>> from holdfast.analysis.budgets import Gate
    >>> as_markdown(Judgement(Gate(()), (), {})).splitlines()[0]
    '### ✅ Gate passed: 0 within budget, 0 undecided, 0 beyond'
    """
    word, (within, undecided, beyond) = "passed" if found.passed else "failed", map(found.count, SIGNS_IN_ORDER)
    sign = SIGNS["pass" if found.passed else "fail"]
    lines = [f"### {sign} Gate {word}: {within} within budget, {undecided} undecided, {beyond} beyond", ""]
    lines += ["| | budget | base → tuned | drift | n | why |", "|---|---|---|---|---|---|"]
    lines += [_row(verdict) for verdict in sorted(found.verdicts, key=lambda one: WORST_FIRST.index(one.outcome))]
    gate = found.gate
    corrected = {"holm": ", corrected for their number by Holm's method", "bh": ", by Benjamini and Hochberg's"}
    lines += ["", f"Level {gate.level:g}{corrected.get(gate.correction, '')}. A budget is exceeded when all of the"]
    lines[-1] += " interval lies beyond it; undecided " + ("fails (strict)." if gate.strict else "passes.")
    if found.too_few:
        few = ", ".join(f"{_cell(name)} ({n})" for name, n in found.too_few.items())
        lines += ["", f"Not judged, fewer than {LEAST} items: {few}."]
    return "\n".join(lines) + "\n"


SIGNS_IN_ORDER: tuple[Outcome, ...] = ("pass", "undecided", "fail")
WORST_FIRST: tuple[Outcome, ...] = ("fail", "undecided", "pass")


def _row(verdict: Verdict) -> str:
    budget, relative = verdict.budget, verdict.budget.relative
    drift = f"{shown(verdict.change.value, relative)} {_span(verdict.interval, relative)}"
    values = f"{shown(verdict.base)} → {shown(verdict.tuned)}"
    n = "–" if verdict.change.n is None else str(verdict.change.n)
    cells = [f"{SIGNS[verdict.outcome]} {verdict.outcome}", str(budget), values, drift, n, verdict.why]
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _span(interval: Interval, relative: bool) -> str:
    low, high = interval
    return "(no interval)" if math.isinf(low) else f"[{shown(low, relative)}, {shown(high, relative)}]"


def _cell(text: str) -> str:
    """Text that cannot break out of a table's cell: no new line, no bar, no tag."""
    plain = re.sub(r"([\\`*_|\[\]])", r"\\\1", " ".join(text.split()))
    return plain.replace("&", "&amp;").replace("<", "&lt;")
