"""A recipe as frozen dataclasses, read from YAML with every fault at once and on its line.

    model: {name: Qwen/Qwen2.5-0.5B-Instruct, lora: {r: 16}}      # or peft: {type: ..., ...}; neither: all weights
    stages:
      - {trainer: sft, data: rows.jsonl, learning_rate: 2e-4}     # every other key: a field of SFTConfig or DPOConfig
    methods: [{target_masked_kl: {strength: 1.0}}]
    output: runs/mine

`load` is all there is to call; `run` takes what it returns. docs/recipes.md lists every key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ..core.errors import ConfigError
from ..core.method import Method, needs_reference, samples_pool
from . import settings
from .data import Data, DataSets, data_of, format_fault, replay_fault, sets_of
from .lines import Faults, Node, Section, guess, read
from .model import ModelSpec, model_of
from .watch_settings import Watching, watching_of

if TYPE_CHECKING:
    from ..integrations.task_cache import Cache
    from .compare_settings import Comparing

Trainer = Literal["sft", "dpo"]
TRAINERS: tuple[Trainer, ...] = ("sft", "dpo")
SET_ELSEWHERE = {
    "output_dir": "the recipe's `output` is the folder",
    "seed": "the recipe's own `seed` is used for everything",
    "resume_from_checkpoint": "a recipe resumes by itself when it is started again",
    "model_init_kwargs": "say how the model is loaded under `model`",
}


@dataclass(frozen=True)
class Stage:
    """One training stage.

    Attributes:
        trainer: `sft` or `dpo`.
        data: what it trains on.
        options: fields of SFTConfig or DPOConfig, as written.
        methods: what protects the model in this stage.
        reference: `base`, `start`, a folder, or None where it goes without saying.
        eval_data: what the trainer itself evaluates on (`eval_strategy`).
        replay: the share of training rows that are drawn from the retain data; 0: none.
    """

    trainer: Trainer
    data: Data
    options: Mapping[str, Any]
    methods: tuple[Method, ...] = ()
    reference: str | None = None
    eval_data: Data | None = None
    replay: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """Everything that `holdfast train` needs to know.

    Attributes:
        source: the file it was read from.
        plain: its content as plain values.
        retain: data of what must not be forgotten, by name; a single one is called `retain`.
        measured: by split, by name, the data on which the loss is measured before and after training.
        scales: of the adapter at which it is measured; 1 is the adapter as trained.
        drift: what is measured during training; None: nothing.
        cache: whether, or where, what the base says of the task is kept, as `holdfast.attach` is told.
        compare: the arms that `holdfast compare` makes of it; None: it is one run.
    """

    source: Path
    plain: Mapping[str, Any] = field(repr=False)
    model: ModelSpec
    stages: tuple[Stage, ...]
    output: Path
    seed: int = 0
    retain: DataSets = field(default_factory=DataSets)
    measured: Mapping[str, Mapping[str, Data]] = field(default_factory=dict)
    scales: tuple[float, ...] = (1.0,)
    experiment: str = ""
    arm: str = ""
    ledger: Path = Path("ledger.jsonl")
    drift: Watching | None = None
    cache: Cache = False
    compare: Comparing | None = None


def load(path: str | Path) -> Recipe:
    """Read a recipe and check all of it: names, types, options of other libraries, methods, files, row formats.

    Raises:
        ConfigError: with every fault and its line.
    """
    path, faults = Path(path), Faults()
    if not path.is_file():
        raise ConfigError(str(path), [f"there is no such file (looked from {Path.cwd()})"])
    root = read(path, faults)
    recipe, compare = None, None
    if root is not None:
        shared = root
        if isinstance(root.value, dict) and "compare" in root.value:
            shared = Node({key: node for key, node in root.value.items() if key != "compare"}, root.line)
        recipe = recipe_of(path, shared, faults)
        if shared is not root:
            from .compare_settings import comparing_of

            compare = comparing_of(root, shared, path, recipe, faults)
    faults.raise_if_any(str(path))
    assert recipe is not None  # without a fault there is a recipe
    return replace(recipe, compare=compare)


def recipe_of(path: Path, root: Node, faults: Faults) -> Recipe | None:
    """Return the recipe that a tree stands for, `compare` apart; None, with the faults noted, if it is none."""
    top = Section(root, "the recipe", faults)
    model_node = top.node("model")
    if model_node is None:
        faults.add(root.line, "the recipe needs 'model': {name: a hub name or folder, lora: {r: 16}}")
    model = model_of(model_node, faults) if model_node else None
    retain_node = top.node("retain")
    retain = sets_of(retain_node, "retain", faults)
    for each in retain.values():
        if fault := format_fault(each, "retain"):
            faults.add(each.line, fault)
    reference, methods = top.node("reference"), top.items("methods")
    stage_nodes = top.items("stages")
    if not stage_nodes:
        faults.add(root.line, "the recipe needs 'stages': a list with at least one {trainer: sft, data: ...}")
    given = retain if retain_node else None
    stages = [_stage(node, methods, reference, i, given, faults) for i, node in enumerate(stage_nodes)]
    if model_node is not None and model is not None and len(stages) > 1 and (why := model.why_one_stage()):
        faults.add(model_node.line, why)
    seed = top.whole("seed", 0)
    output = Path(top.text("output", required="the folder for checkpoints, adapter and ledger"))
    measured, scales = _measured(top.node("evaluate"), model, faults)
    drift_node = top.node("drift")
    drift = watching_of(drift_node, [stage.options for stage in stages if stage], faults) if drift_node else None
    cache = _cache(top.node("cache"), faults)
    experiment, arm = top.text("experiment", output.name), top.text("arm")
    ledger = Path(top.text("ledger") or output / "ledger.jsonl")
    top.close()
    if model is None or not all(stages) or faults.found:
        return None
    whole = cast(tuple[Stage, ...], tuple(stages))
    return Recipe(
        path, root.plain(), model, whole, output, seed or 0, retain, measured, scales,
        experiment, arm or _arm(model, whole), ledger, drift, cache,
    )  # fmt: skip


def _stage(
    node: Node, shared: list[Node], reference: Node | None, number: int, retain: DataSets | None, faults: Faults
) -> Stage | None:
    section = Section(node, f"stage {number + 1}", faults)
    trainer = section.text("trainer", required="sft or dpo")
    data_node = section.node("data")
    data = data_of(data_node, "data", faults) if data_node else None
    if data_node is None and isinstance(node.value, dict):
        faults.add(node.line, f"stage {number + 1} needs 'data': a file, a folder or a hub name")
    eval_node = section.node("eval_data")
    eval_data = data_of(eval_node, "eval_data", faults) if eval_node else None
    own = section.node("methods")
    nodes = shared if own is None else own.value if isinstance(own.value, list) else [own]
    methods = [(each.line, method) for each in nodes for method in settings.method(each, faults)]
    reference = section.node("reference") or reference
    chosen = _reference(reference, faults)
    for line, method in methods:
        if method.strength and method.uses_retain and retain is None and not samples_pool(method):
            faults.add(line, f"{method.name} needs retain data: add `retain: {{data: my_general_text.jsonl}}`")
        if number and chosen is None and needs_reference(method):
            faults.add(
                node.line,
                f"stage {number + 1} starts from the adapter of stage {number}, so the reference of {method.name} "
                "could mean two things: write `reference: base` (before any training) or `reference: start`",
            )
    replay = _replay(section.node("replay"), retain, faults)
    given = section.rest()
    if trainer not in TRAINERS:
        if trainer:
            faults.add(node.line, f"trainer must be sft or dpo, got {trainer!r}.{guess(trainer, TRAINERS)}")
        return None
    options = _options(trainer, given, node.line, number, faults)
    if data and (fault := format_fault(data, trainer, options.get("dataset_text_field", "text"))):
        faults.add(data.line, fault)
    if data is None:
        return None
    if replay and retain and (fault := replay_fault(data, retain, options.get("dataset_text_field", "text"))):
        faults.add(node.line, fault)
    return Stage(trainer, data, options, tuple(method for _, method in methods), chosen, eval_data, replay)


def _replay(node: Node | None, retain: DataSets | None, faults: Faults) -> float:
    if node is None:
        return 0.0
    share = node.value
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share < 1:
        faults.add(
            node.line,
            f"replay is the share of training rows that come from the retain data, a number between 0 and 1, got "
            f"{node.plain()!r}",
        )
        return 0.0
    if retain is None:
        faults.add(node.line, "replay needs retain data: add `retain: {data: my_general_text.jsonl}`")
    return float(share)


def _options(trainer: Trainer, given: Mapping[str, Node], line: int, number: int, faults: Faults) -> dict[str, Any]:
    from .training import arguments_class, training_arguments

    count = len(faults.found)
    config_class = arguments_class(trainer)
    name = f"{config_class.__name__} in stage {number + 1}"
    options = settings.checked(given, config_class, name, faults, refused=SET_ELSEWHERE)
    if len(faults.found) == count:
        try:
            training_arguments(trainer, options, Path("unused"), seed=0)
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            faults.add(line, f"{name}: {error}")
    return options


def _reference(node: Node | None, faults: Faults) -> str | None:
    if node is None:
        return None
    choice = node.value
    if isinstance(choice, str) and choice in ("base", "start"):
        return choice
    if not isinstance(choice, str):
        faults.add(node.line, f"reference must be base, start or a folder, got {node.plain()!r}")
    elif not any((Path(choice) / name).is_file() for name in ("adapter_config.json", "config.json")):
        faults.add(node.line, f"reference must be base, start, or a folder with a model or an adapter, got {choice!r}")
    else:
        return choice
    return None


def _cache(node: Node | None, faults: Faults) -> Cache:
    from ..integrations.task_cache import faults_of

    given = False if node is None else node.plain()
    found = faults_of(given)
    for fault in found:
        faults.add(node.line if node else 0, fault)
    return False if found else cast("Cache", given)


def _measured(
    node: Node | None, model: ModelSpec | None, faults: Faults
) -> tuple[dict[str, dict[str, Data]], tuple[float, ...]]:
    """Read `evaluate:`: data sets by name, or `validation:` and `test:` with data sets by name, and `scales:`."""
    if node is None:
        return {}, (1.0,)
    section = Section(node, "evaluate", faults)
    scales: list[float] = []
    for item in section.items("scales"):
        if isinstance(item.value, int | float) and not isinstance(item.value, bool) and 0 <= item.value <= 4:
            scales.append(float(item.value))
        else:
            faults.add(item.line, f"a scale is a number from 0 to 4, got {item.plain()!r}")
    if any(scale != 1 for scale in scales) and model is not None and (why := model.why_no_scale()):
        faults.add(node.line, f"{why}: leave scales out")
    splits: dict[str, dict[str, Node]] = {"validation": {}, "test": {}}
    for split, nodes in splits.items():
        if (inner := section.node(split)) is not None:
            nodes.update(Section(inner, f"evaluate.{split}", faults).rest())
    splits["test"].update(section.rest())
    found: dict[str, dict[str, Data]] = {}
    for split, nodes in splits.items():
        for name, each in nodes.items():
            if (data := data_of(each, f"evaluate.{name}", faults)) is not None:
                if fault := format_fault(data, "text"):
                    faults.add(data.line, fault)
                found.setdefault(split, {})[name] = data
    return found, tuple(scales) or (1.0,)


def _arm(model: ModelSpec, stages: tuple[Stage, ...]) -> str:
    """Name a run by what protects it."""
    names = dict.fromkeys(method.name for stage in stages for method in stage.methods if method.strength)
    if any(stage.replay for stage in stages):
        names["replay"] = None
    kind = "LoRA" if model.peft_type == "LORA" else model.peft_type or "all weights"
    return " + ".join(names) or f"plain {kind}"
