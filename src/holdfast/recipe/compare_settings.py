"""`compare:` of a recipe: the arms that it is made into, and what they are compared by; all faults at once.

    compare:
      learn: new_task                             # arms are matched where they have learned as much of this
      keep: [old_skills]                          # and compared by these
      arms:
        plain LoRA: {learning_rate: [1e-3, 2e-3]}
        self-replay: {methods: [self_replay], learning_rate: [2e-3, 4e-3]}

Every point of every arm's grid is a recipe of its own, checked as any other. Read next: `compare_grid`, how an arm
becomes recipes; `compare_scores`; `compare`, which runs them; docs/compare.md.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from ..drift.ledger import JSON
from ..drift.probe import BASE, Probe, digest_of
from .compare_grid import grid, inside
from .compare_scores import loss_on, scores_of, suite_of
from .lines import Faults, Node, Section, guess
from .watch_settings import Watching

if TYPE_CHECKING:
    from ..analysis.scores import ScoreKind
    from .config import Recipe

SCALES = (0.2, 0.4, 0.6, 0.8, 1.0)
SEEDS = (0, 1, 2)
LONG = 120  # of a folder's name
ELSEWHERE = {
    ("seed",): "seeds of a comparison are `compare: {seeds: [0, 1, 2]}`",
    ("arm",): "arms of a comparison have their names under `compare: {arms: ...}`",
    ("evaluate", "scales"): "scales of a comparison are `compare: {scales: [...]}`",
}


@dataclass(frozen=True)
class Variant:
    """One point of an arm's grid.

    Attributes:
        arm: whose.
        settings: what the ledger calls it.
        recipe: what it is.
        scales: of its adapter at which it is measured.
    """

    arm: str
    settings: Mapping[str, JSON]
    recipe: Recipe = field(repr=False)
    scales: tuple[float, ...] = (1.0,)

    @property
    def name(self) -> str:
        """Of its folders: the arm and its settings, without signs that file systems do not like."""
        told = [self.arm, *(f"{key} {value}" for key, value in self.settings.items())]
        name = "_".join(re.sub(r"[^\w.+-]+", "-", text).strip("-.") for text in told)
        return name if len(name) <= LONG else f"{name[:LONG]}-{digest_of(told)}"


@dataclass(frozen=True)
class Comparing:
    """What is compared.

    Attributes:
        variants: all arms' points, in the order of the recipe.
        baseline: the arm that the others are compared with.
        seeds: of each point.
        checkpoints: numbers of steps of the last stage after which it is measured too.
        repairs: factors of its intruder dimensions with which it is measured too, at scale 1.
        learn: the score at which arms are matched.
        keep: the scores by which they are compared.
        suite: probes of `holdfast drift` beside the data of `evaluate`; None: only those.
    """

    variants: tuple[Variant, ...]
    baseline: str
    seeds: tuple[int, ...]
    checkpoints: tuple[int, ...]
    learn: str
    keep: tuple[str, ...]
    suite: Watching | None = None
    repairs: tuple[float, ...] = ()

    @property
    def kinds(self) -> dict[str, ScoreKind]:
        """How the losses on data sets are read: `new_task_loss` is "New task loss", and lower is better."""
        from ..analysis.scores import ScoreKind

        names = dict.fromkeys(name for v in self.variants for data in v.recipe.measured.values() for name in data)
        return {loss_on(name): ScoreKind(f"{_title(name)} loss", False, ".3f") for name in names}

    def probes(self, split: Literal["validation", "test"]) -> list[Probe]:
        """The probes of the suite, on a split."""
        return [] if self.suite is None else self.suite.probes(self.variants[0].recipe.model.name, split)


def _title(name: str) -> str:
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def comparing_of(root: Node, shared: Node, path: Path, recipe: Recipe | None, faults: Faults) -> Comparing | None:
    """Read `compare:` of a recipe; what is wrong is noted.

    Args:
        root: the whole file.
        shared: without `compare`.
        path: of the file.
        recipe: what `shared` stands for; None if it has faults.
        faults: where faults go.
    """
    node = inside(root, ("compare",)) or root
    section = Section(node, "compare", faults)
    for place, why in ELSEWHERE.items():
        if (found := inside(root, place)) is not None:
            faults.add(found.line, f"{'.'.join(place)} does not belong here: {why}")
    arms_node = section.node("arms")
    arms = arms_node.value if arms_node is not None and isinstance(arms_node.value, dict) else {}
    if len(arms) < 2:
        faults.add((arms_node or node).line, "compare needs 'arms': two or more, by name, each with what it changes")
    baseline = section.text("baseline", next(iter(arms), ""))
    if arms and baseline not in arms:
        line = (inside(node, ("baseline",)) or node).line
        faults.add(line, f"baseline {baseline!r} is none of the arms {', '.join(arms)}.{guess(baseline, arms)}")
    seeds = _numbers(section, "seeds", SEEDS, faults)
    checkpoints = tuple(sorted(_numbers(section, "checkpoints", (), faults, least=1)))
    scales = tuple(sorted(_numbers(section, "scales", SCALES, faults, whole=False, most=4)))
    repairs = tuple(sorted(_numbers(section, "repairs", (), faults, whole=False, most=1)))
    suite = suite_of(section, recipe.model.name if recipe else "", faults)
    learn, keep = scores_of(section, inside(shared, ("evaluate",)), suite, faults)
    section.close()
    variants = [
        variant
        for arm, each in arms.items()
        for variant in _variants(arm, each, path, shared, scales, checkpoints, faults)
    ]
    for name, times in Counter(variant.name for variant in variants).items():
        if times > 1:
            faults.add(node.line, f"{times} runs would share the folder {name!r}: give the arms other names")
    if faults.found:
        return None
    return Comparing(tuple(variants), baseline, cast(tuple[int, ...], seeds), cast(tuple[int, ...], checkpoints),
                     learn, keep, suite, repairs)  # fmt: skip


def _variants(
    arm: str, node: Node, path: Path, shared: Node, scales: tuple[float, ...], checkpoints: tuple[float, ...],
    faults: Faults,
) -> Iterator[Variant]:  # fmt: skip
    """An arm's points; what is wrong with its recipes and not with the shared one is told with the arm's name."""
    from .config import recipe_of

    if arm == BASE:
        faults.add(node.line, f"no arm can be called {BASE!r}: that is the model before training")
    known = {*faults.found}
    for settings, changed in grid(node, shared, faults):
        own = Faults()
        recipe = recipe_of(path, changed, own)
        if recipe is not None:
            _refuse(recipe, checkpoints, node.line, own)
            yield Variant(arm, settings, recipe, (1.0,) if recipe.model.why_no_scale() else scales)
        for line, text in own.found:
            if (line, text) not in known:
                faults.add(line, f"arm {arm!r}: {text}")


def _refuse(recipe: Recipe, checkpoints: tuple[float, ...], line: int, faults: Faults) -> None:
    """Note what could be trained and not be measured as asked."""
    if getattr(recipe.model.peft_config(), "is_prompt_learning", False):
        faults.add(line, "prompt learning is not measured here: its positions are not the base's")
    steps = recipe.stages[-1].options.get("max_steps", -1)
    for late in (number for number in checkpoints if 0 < steps <= number):
        faults.add(line, f"checkpoint {late} is no early one: the last stage has {steps} steps (max_steps)")


def _numbers(
    section: Section, key: str, default: tuple[float, ...], faults: Faults, *, whole: bool = True, least: int = 0,
    most: int = 2**31,
) -> tuple[float, ...]:  # fmt: skip
    """Take a list of different numbers, not an empty one where there is a default."""
    given, found = section.node(key), list[float]()
    if given is None:
        return default
    if not isinstance(given.value, list) or (default and not given.value):
        such = list(default or (least + 1,))
        faults.add(given.line, f"{key} must be a list of numbers such as {such}, got {given.plain()!r}")
        return default
    for item in given.value:
        value = item.value
        fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not fits or not least <= cast(float, value) <= most:
            kind = f"a whole number >= {least}" if whole else f"a number from {least} to {most}"
            faults.add(item.line, f"{key}: {kind} is needed, got {item.plain()!r}")
        elif value in found:
            faults.add(item.line, f"{key}: {value} is given twice")
        else:
            found.append(cast(float, value))
    return tuple(found) or default
