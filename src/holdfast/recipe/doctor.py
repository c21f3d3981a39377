"""Says before a run whether it can work: everything that can be looked at without training, all at once.

    recipe · model · data · host · for every stage: reference, methods, retain data · memory · disk

Each check is the one that the run would make itself, made here on a model without weights; what could only be shown
with them is said to be unproven, or is proven where the model is small or `load` asks for it. Read next:
`doctor_reference`, `doctor_methods`, and `memory`; docs/memory.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..analysis.memory import GIB, Part, peak
from ..core.errors import ConfigError
from . import doctor_data, doctor_disk, doctor_host, doctor_methods, doctor_model, doctor_reference
from .config import Recipe, load
from .doctor_findings import Finding, Findings
from .memory import host_parts
from .memory_facts import Facts, facts_of
from .memory_methods import added

SMALL = 2**28  # bytes of weights up to which a model is loaded unasked
NEARLY = 0.9


@dataclass(frozen=True)
class Question:
    """What a doctor is asked.

    Attributes:
        recipe: its file.
        memory: bytes of the device that it will run on; None: those of this machine's.
        length: tokens of a sequence; None: as the recipe says.
        batch: sequences of a micro-batch; None: as the recipe says.
        load: read weights, and data of the hub, to prove what can be proven.
        launch: accelerate's config file, with which it will be launched.
    """

    recipe: Path
    memory: int | None = None
    length: int | None = None
    batch: int | None = None
    load: bool = False
    launch: Path | None = None


@dataclass(frozen=True)
class StageMemory:
    """What a stage takes of memory.

    Attributes:
        name: of the stage.
        parts: line by line.
        tokens: of a micro-batch.
    """

    name: str
    parts: tuple[Part, ...]
    tokens: int

    @property
    def peak(self) -> int:
        """The most at one time on the device, in bytes."""
        return peak(self.parts)


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        findings: line by line.
        memory: of every stage that could be looked at.
        limit: bytes of the device.
        device: what it is.
    """

    findings: Sequence[Finding]
    memory: Sequence[StageMemory] = ()
    limit: int = 0
    device: str = ""

    @property
    def faulty(self) -> bool:
        """Whether the run cannot work."""
        return any(found.status == "fault" for found in self.findings)


@dataclass
class _Made:
    """What is known so far."""

    found: Findings = field(default_factory=Findings)
    memory: list[StageMemory] = field(default_factory=list)


def examine(asked: Question) -> Report:
    """Look at everything that a recipe needs; of one that compares arms, at each arm's first setting."""
    limit, device = device_memory() if asked.memory is None else (asked.memory, "as asked")
    made = _Made()
    try:
        recipe = load(asked.recipe)
    except ConfigError as error:
        for fault in error.faults:
            made.found.fault("recipe", fault)
        return Report(made.found, (), limit, device)
    made.found.ok("recipe", f"{asked.recipe} is valid")
    if recipe.compare is None:
        _look(recipe, asked, limit, made)
    else:
        firsts = {variant.arm: variant for variant in reversed(recipe.compare.variants)}
        arms = {arm: _Made() for arm in reversed(firsts)}
        for arm, own in arms.items():
            _look(firsts[arm].recipe, asked, limit, own)
            made.memory += [replace(each, name=f"arm {arm}: {each.name}") for each in own.memory]
        made.found += _by_arm({arm: own.found for arm, own in arms.items()})
    return Report(made.found, made.memory, limit, device)


def _by_arm(found: Mapping[str, Findings]) -> Iterator[Finding]:
    """Yield what was found of every arm alike, once, then what is each arm's own."""
    first, *others = found.values()
    alike = [one for one in first if all(one in other for other in others)]
    yield from (replace(one, about=f"every arm: {one.about}") for one in alike)
    for arm, own in found.items():
        yield from (replace(one, about=f"arm {arm}: {one.about}") for one in own if one not in alike)


def _look(recipe: Recipe, asked: Question, limit: int, made: _Made) -> None:
    found = made.found
    bones, tokenizer = doctor_model.look(recipe.model, found)
    read = doctor_data.look(recipe, tokenizer, found, load=asked.load)
    doctor_host.look(recipe, asked.launch, found)
    if bones is None:
        return
    if recipe.measured and getattr(recipe.model.peft_config(), "is_prompt_learning", False):
        found.fault(
            "evaluate", "prompt learning is not measured here: use the trainer's own eval_data, or leave it out."
        )
    weights = bones.base_bytes <= SMALL and doctor_model.weights_are_here(recipe.model)
    written = []
    for number, stage in enumerate(recipe.stages):
        kind = doctor_reference.look(recipe, number, bones, found, load=asked.load or weights)
        retain = doctor_data.retain_sets(recipe, stage, tokenizer, found)
        facts = facts_of(
            recipe, stage, bones, batch=asked.batch, length=asked.length, reference=kind, retain=retain,
            on_cpu=None if asked.memory is None else False,
        )  # fmt: skip
        rows = read.get(number)
        facts = replace(facts, rows=rows.rows if rows else 0)
        sets = doctor_methods.look(stage, number, facts, set(rows.columns) if rows else set(), found)
        facts = replace(facts, retain=sets)
        name = f"stage {number + 1} ({stage.trainer})"
        with found.noting(f"{name}: memory"):
            doctor_data.enough(stage, number, facts, rows, found)
            parts = [*host_parts(facts), *added(stage.methods, facts)]
            made.memory.append(StageMemory(name, tuple(parts), facts.tokens))
            _fits(made.memory[-1], facts, limit, found)
            written.append((stage, facts, parts, rows))
    doctor_disk.look(recipe, written, found)


def _fits(stage: StageMemory, facts: Facts, limit: int, found: Findings) -> None:
    rows = f"{facts.batch} x {facts.length:,} tokens"
    said = f"about {stage.peak / GIB:.2f} GiB at most, with {rows}, of {limit / GIB:.2f} GiB"
    about = f"{stage.name}: memory"
    most = getattr(facts.skeleton.config, "max_position_embeddings", None)
    if most is not None and facts.length > most:
        found.warn(about, f"sequences of {facts.length:,} tokens are longer than the model's {most:,} positions")
    if stage.peak > limit:
        way = "a smaller per_device_train_batch_size, a shorter max_length"
        more = "" if facts.checkpointing else ", gradient_checkpointing: true"
        found.fault(about, f"{said}: it does not fit. Try {way}{more}, or dtype: bfloat16.")
    elif stage.peak > NEARLY * limit:
        found.warn(about, f"{said}: nearly all of it, and this is an estimate")
    else:
        found.ok(about, said)


def device_memory() -> tuple[int, str]:
    """Return the bytes of the first accelerator, or of the machine where there is none, and what it is."""
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return int(found.total_memory), found.name
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "CPU"
