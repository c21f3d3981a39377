"""Reads a gate's budgets from YAML. All faults are told at once, with their lines.

A budget that is misread, or given twice, would let drift through without a word. Read next: docs/gate.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

from holdfast.analysis.budgets import EACH, SIDES, Budget, Gate, GateError, guess
from holdfast.analysis.paired import CORRECTIONS, Correction
from holdfast.analysis.scores import ScoreKind, find

if TYPE_CHECKING:
    import yaml

Value: TypeAlias = "Mapping[str, _At] | str | int | float | bool | None"


class _At(NamedTuple):
    """A value of the file and the line it stands on."""

    line: int
    value: Value


def read_gate(
    path: str | Path, *, scores: Collection[str] | None = None, kinds: Mapping[str, ScoreKind] | None = None
) -> Gate:
    """Read a gate from a YAML file.

    Args:
        path: the file; docs/gate.md shows one.
        scores: the names that a budget may have; None leaves them to `judge`, which knows what was measured.
        kinds: as for `judge`: which scores are shares, whose budgets must lie below 1.

    Raises:
        GateError: lists everything that is wrong with the file, with its lines.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "gate.yaml"
    >>> _ = path.write_text("budgets: {refusal: {fall: 0.02}, story_perplexity: {rise: 3%}}")
    >>> [str(budget) for budget in read_gate(path).budgets]
    ['refusal may fall by at most 0.02', 'story_perplexity may rise by at most 3 %']
    """
    reader = _Reader(scores, kinds)
    try:
        gate = reader.gate(reader.tree(Path(path).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise GateError(str(path), [f"it cannot be read: {error}"]) from None
    if reader.faults:
        raise GateError(str(path), [f"line {line}: {fault}" for line, fault in sorted(set(reader.faults))])
    return gate


class _Reader:
    """Turns YAML into a gate and notes every fault on the way."""

    def __init__(self, scores: Collection[str] | None, kinds: Mapping[str, ScoreKind] | None) -> None:
        self.scores, self.kinds = scores, kinds
        self.faults: list[tuple[int, str]] = []

    def tree(self, text: str) -> _At:
        """The values of the file with their lines."""
        import yaml  # here alone: reports are written without it

        try:
            loader = yaml.SafeLoader(text)
            root = loader.get_single_node()
            return _At(1, {}) if root is None else self._at(root, loader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            told = getattr(error, "problem", None) or str(error)
            self.faults.append((mark.line + 1 if mark else 1, f"this is not YAML: {' '.join(told.split())}"))
        except RecursionError:
            self.faults.append((1, "a part of it contains itself; write the budgets out"))
        return _At(1, {})

    def _at(self, node: yaml.Node, loader: yaml.SafeLoader) -> _At:
        from yaml import MappingNode, ScalarNode

        line = node.start_mark.line + 1
        if not isinstance(node, MappingNode):
            plain = isinstance(node, ScalarNode)
            return _At(line, cast("Value", loader.construct_object(node)) if plain else "a list")
        found: dict[str, _At] = {}
        for key, value in node.value:
            name, at = str(key.value), key.start_mark.line + 1
            if name in found:
                self.faults.append((at, f"{name!r} is given twice (first on line {found[name].line}); keep one"))
            else:
                found[name] = _At(at, self._at(value, loader).value)
        return _At(line, found)

    def gate(self, root: _At) -> Gate:
        """The whole file."""
        top = self._mapping(root, "the gate", ("budgets", "level", "correction", "strict"))
        level, correction, strict = (top.get(name) for name in ("level", "correction", "strict"))
        if not self.faults and ("budgets" not in top or not top["budgets"].value):
            self.faults.append((root.line, "there are no budgets; write budgets: {refusal: {fall: 0.02}}"))
        if level and not 0 < _number(level.value)[0] < 1:
            self.faults.append((level.line, f"level must lie between 0 and 1, such as 0.05, got {level.value!r}"))
        if correction and correction.value not in CORRECTIONS:
            said = f"correction must be one of {', '.join(CORRECTIONS)}, got {correction.value!r}"
            self.faults.append((correction.line, said))
        if strict and not isinstance(strict.value, bool):
            self.faults.append((strict.line, f"strict must be true or false, got {strict.value!r}"))
        budgets = tuple(self._budgets(top["budgets"])) if "budgets" in top and top["budgets"].value else ()
        if self.faults:
            return Gate(())
        return Gate(
            budgets,
            level=_number(level.value)[0] if level else Gate.level,
            correction=cast(Correction, correction.value) if correction else Gate.correction,
            strict=bool(strict.value) if strict else Gate.strict,
        )

    def _budgets(self, budgets: _At) -> Iterator[Budget]:
        for score, own in self._mapping(budgets, "budgets", None).items():
            if self.scores is not None and score not in self.scores:
                self.faults.append((own.line, f"no score is called {score!r}.{guess(score, self.scores)}"))
            parts = self._mapping(own, score, (*SIDES, "each_category", "categories"))
            found = list(self._limits(score, None, {side: parts[side] for side in SIDES if side in parts}))
            if "each_category" in parts:
                each = self._mapping(parts["each_category"], f"each_category of {score}", SIDES)
                found += self._limits(score, EACH, each)
            for name, one in self._mapping(parts.get("categories", _At(own.line, {})), "categories", None).items():
                found += self._limits(score, name, self._mapping(one, f"{name} of {score}", SIDES))
            if not found and own.line not in {line for line, _ in self.faults}:
                self.faults.append((own.line, f"{score} has no budget; write {score}: {{fall: 0.02}}, or rise"))
            yield from found

    def _limits(self, score: str, category: str | None, sides: Mapping[str, _At]) -> Iterator[Budget]:
        for side in SIDES:
            if side not in sides:
                continue
            line, value = sides[side]
            number, relative = _number(value)
            if not 0 <= number < math.inf:
                said = f"{score}: {side} must be a number >= 0, or a share of the base's value such as '3%', got"
                self.faults.append((line, f"{said} {value!r}"))
            elif number >= 1 and not relative and (known := find(score, self.kinds)) and known.share:
                said = f"{score} lies between 0 and 1 and can never {side} by more than {value}"
                self.faults.append((line, f"{said}; two points are 0.02, '2%' is a share of the base's value"))
            else:
                yield Budget(score, side, number, relative, category)

    def _mapping(self, at: _At, what: str, known: Collection[str] | None) -> Mapping[str, _At]:
        if not isinstance(at.value, Mapping):
            self.faults.append((at.line, f"{what} must be a mapping, got {at.value!r}"))
            return {}
        for name, part in at.value.items():
            if known is not None and name not in known:
                self.faults.append((part.line, f"unknown key {name!r} in {what}.{guess(name, known)}"))
        return at.value


def _number(value: Value) -> tuple[float, bool]:
    """The number, and whether it is a share of the base's value; NaN for anything else."""
    if isinstance(value, str):
        text = value.strip()
        try:
            return (float(text[:-1]) / 100, True) if text.endswith("%") else (float(text), False)
        except ValueError:
            return math.nan, False
    return (math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)), False
