"""Runs a recipe: stage after stage, resumed where it was stopped, and then measured into the ledger.

    output/
      recipe.yaml  progress.json         what was asked for; which stages are finished
      stage-1/checkpoint-100 ...         TRL's checkpoints, holdfast's state beside them
      stage-1/result                     what the next stage starts from
      adapter  (or model)                the result of the last stage
      ledger.jsonl                       losses before and after, costs

Nothing is written in place: a result appears under its name when it is whole. Read next: `progress`, `training`.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.distributed import rank
from ..core.errors import NotYetSupported
from ..core.method import needs_reference, needs_retain
from ..drift.ledger import JSON, Entry, Ledger, RunKey, Score
from ..integrations import hf_trainer
from ..integrations.pools import RetainData
from ..integrations.replay import mix
from .config import Recipe, Stage
from .data import refuse_format
from .measure import at_scale, mean_loss
from .probe_budgets import probe_measures
from .progress import Progress
from .training import START, Say, dpo_reference, last_complete_checkpoint, make_trainer
from .watch_settings import Watching
from .watch_sides import why_off_is_not_base

if TYPE_CHECKING:
    from datasets import Dataset

    from ..integrations.task_cache import Cache

BASE = "base"
Prepare = Callable[[Any, int], None]
REFERENCES = {BASE: "the base, before any training", "start": START}


@dataclass(frozen=True)
class Result:
    """Where a finished run's things are, and its ledger entries (the base first)."""

    folder: Path
    ledger: Path
    entries: list[Entry]


def run(recipe: Recipe, say: Say = print, prepare: Prepare = lambda trainer, number: None) -> Result:
    """Train what a recipe asks for, or the part of it that is not finished, and measure it.

    Args:
        recipe: from `config.load`.
        say: where messages go.
        prepare: called with each stage's trainer and its number (from 0) before it starts.

    Raises:
        WrongSetup: if the output folder is another run's, data or model cannot be loaded, or a method cannot work here.
    """
    from accelerate import PartialState

    with PartialState().main_process_first():  # the others find the folder as the main process leaves it
        progress = Progress(recipe)
    for number, stage in enumerate(recipe.stages):
        name = f"stage {number + 1} of {len(recipe.stages)} ({stage.trainer})"
        if progress.stage(number) is not None:
            say(f"{name}: finished before.")
            continue
        say(f"{name}: {stage.data.path}" + ("" if stage.methods else ", without any method"))
        progress.finish(number, _train(recipe, stage, number, say, prepare))
    entries = _measure(recipe, progress, say) if rank() == 0 else []
    return Result(result_folder(recipe, len(recipe.stages) - 1), recipe.ledger, entries)


def result_folder(recipe: Recipe, number: int) -> Path:
    """Return where the result of a stage (from 0) lies."""
    if number < len(recipe.stages) - 1:
        return recipe.output / f"stage-{number + 1}" / "result"
    return recipe.output / ("adapter" if recipe.model.peft_type else "model")


def _student(recipe: Recipe, number: int, *, trainable: bool = True) -> tuple[Any, Any]:
    """Return model and tokenizer as stage `number` begins; with an adapter only if an earlier stage made one."""
    if number == 0:
        return recipe.model.load()
    previous = result_folder(recipe, number - 1)
    if not recipe.model.peft_type:
        return replace(recipe.model, name=str(previous), revision=None).load()
    from peft import PeftModel

    model, tokenizer = recipe.model.load()
    return PeftModel.from_pretrained(model, str(previous), is_trainable=trainable), tokenizer


def _train(recipe: Recipe, stage: Stage, number: int, say: Say, prepare: Prepare) -> dict[str, float]:
    folder = recipe.output / f"stage-{number + 1}"
    trainer, tokenizer = begun(recipe, stage, number, say, folder)
    if recipe.drift is not None:
        _watch(recipe, recipe.drift, trainer, number, say)
    prepare(trainer, number)
    checkpoint = last_complete_checkpoint(folder, methods=bool(stage.methods), say=say)
    if checkpoint is not None:
        say(f"goes on from {checkpoint}.")
    started, cpu = time.perf_counter(), time.process_time()
    output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    spent, spent_cpu = time.perf_counter() - started, time.process_time() - cpu
    save(trainer, tokenizer, result_folder(recipe, number))
    figures = {"train_loss": float(output.training_loss), "steps": float(output.global_step)}
    if checkpoint is None:  # of a resumed run only the last part would be counted
        figures |= {"train_seconds": spent, "train_cpu_seconds": spent_cpu}
    return figures


def begun(recipe: Recipe, stage: Stage, number: int, say: Say, folder: Path) -> tuple[Any, Any]:
    """Return the trainer of a stage (from 0) with its methods attached, not yet started, and the tokenizer.

    Args:
        recipe: the whole of it.
        stage: the stage.
        number: of the stage, from 0.
        say: where messages go.
        folder: the trainer's own.

    Raises:
        WrongSetup: if data or model cannot be loaded, or a method cannot work here.
    """
    model, tokenizer = _student(recipe, number)
    peft_config = recipe.model.peft_config() if number == 0 else None
    rows = _rows(recipe, stage, say)
    trainer = make_trainer(stage, rows, model, tokenizer, peft_config, folder, recipe.seed)
    if stage.trainer == "dpo":
        say(f"DPO's own reference (its loss compares with it): {dpo_reference(trainer)}")
        say(f"holdfast's reference (its methods compare with it): {_described(stage)}.")
    if stage.methods:
        reference = _reference(recipe, stage, number, trainer.args.device)
        measures = probe_measures(trainer, stage.methods, recipe.drift or Watching(), lambda: _other(recipe, trainer))
        session = hf_trainer.attach(
            trainer, stage.methods, retain=_retain(recipe, stage), reference=reference, measures=measures,
            cache=_cache(recipe, number),
        )  # fmt: skip
        say(session.explain())
    return trainer, tokenizer


def _cache(recipe: Recipe, number: int) -> Cache:
    """Return what `attach` is told of the cache: with several stages a folder has one in it for each."""
    asked = {"folder": recipe.cache} if isinstance(recipe.cache, str | Path) else recipe.cache
    if isinstance(asked, bool) or "folder" not in asked or len(recipe.stages) == 1:
        return asked
    return {**asked, "folder": Path(asked["folder"]) / f"stage-{number + 1}"}


def _watch(recipe: Recipe, asked: Watching, trainer: Any, number: int, say: Say) -> None:
    from .watch import watch

    callback = watch(trainer, ledger=recipe.ledger, base=_other(recipe, trainer), **vars(asked))
    callback.say, callback.arm = say, recipe.arm
    if len(recipe.stages) > 1:
        callback.settings["stage"] = number + 1


def _other(recipe: Recipe, trainer: Any) -> Any:
    """Return the base, loaded anew where the student cannot be turned back into it; else None."""
    switches = hasattr(trainer.model, "peft_config") and not why_off_is_not_base(trainer.model)
    return None if switches else recipe.model.load()[0].to(trainer.args.device)


def _rows(recipe: Recipe, stage: Stage, say: Say) -> Dataset:
    """Return what a stage trains on: its data, with retain rows among them if it asks for replay."""
    rows = stage.data.rows()
    if not stage.replay:
        return rows
    sets = {name: data.rows() for name, data in recipe.retain.items()}
    field = stage.options.get("dataset_text_field", "text")
    mixed = mix(rows, sets, share=stage.replay, seed=recipe.seed, text_field=field)
    count = len(mixed) - len(rows)
    say(
        f"replay: {count} of {len(mixed)} training rows ({count / len(mixed):.0%}) are drawn from the "
        f"{sum(map(len, sets.values()))} rows of retain ({', '.join(sets)})."
    )
    return mixed


def _retain(recipe: Recipe, stage: Stage) -> RetainData:
    """Return the retain sets by name, or the only one where it has no name of its own."""
    if not any(map(needs_retain, stage.methods)):
        return ()
    sets = {name: data.pool or data.rows() for name, data in recipe.retain.items()}
    return sets["retain"] if list(sets) == ["retain"] else sets


def _described(stage: Stage) -> str:
    if not any(map(needs_reference, stage.methods)):
        return "none, since no method of this stage has one"
    reference = stage.reference or BASE
    return REFERENCES.get(reference, f"what lies in {reference}")


def _reference(recipe: Recipe, stage: Stage, number: int, device: Any) -> Any:
    """Return what `attach` is told; a later stage's base is loaded anew where the student cannot be turned back."""
    wanted = any(map(needs_reference, stage.methods))
    if number == 0 or stage.reference != BASE or not wanted:
        return stage.reference
    keeps_base = recipe.model.peft_type == "LORA" and recipe.model.adapter.get("init_lora_weights", True) in (
        True,
        "gaussian",
        "orthogonal",
    )
    if keeps_base and recipe.model.adapter.get("bias", "none") == "none":
        return BASE
    return recipe.model.load()[0].to(device)


def save(trainer: Any, tokenizer: Any, folder: Path) -> None:
    """Write what a trainer has made so far, whole or not at all."""
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        temporary = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        only = {"selected_adapters": ["default"]} if hasattr(model, "peft_config") else {}  # DPO adds one of its own
        model.save_pretrained(temporary, **only)
        tokenizer.save_pretrained(temporary)
        temporary.replace(folder)
    trainer.accelerator.wait_for_everyone()


def _measure(recipe: Recipe, progress: Progress, say: Say) -> list[Entry]:
    """Append what the ledger does not have yet, and return this run's entries."""
    from accelerate import PartialState

    ledger, stages = Ledger(recipe.ledger), len(recipe.stages)
    figures = [progress.stage(number) or {} for number in range(stages)]
    cost = {
        name: sum(each[name] for each in figures)
        for name in ("steps", "train_seconds", "train_cpu_seconds")
        if all(name in each for each in figures)
    }
    settings = settings_of(recipe)
    wanted: list[tuple[str, dict[str, JSON], str, float]] = [(BASE, {}, split, 1.0) for split in recipe.measured]
    for split, scale in product(recipe.measured, recipe.scales):
        wanted.append((recipe.arm, {**settings, "scale": scale}, split, scale))
    if not recipe.measured:
        wanted = [(recipe.arm, settings, "train", 1.0)]
    known = {(e.key, e.split): e for e in ledger.entries(recipe.experiment, status=None)}
    entries, loaded = [], dict[bool, tuple[Any, Any]]()
    for arm, chosen, split, scale in wanted:
        key = RunKey.of(recipe.experiment, arm, chosen, recipe.seed)
        if (key, split) not in known:
            if not recipe.measured:
                scores = {"train_loss": Score(figures[-1]["train_loss"])}
            else:
                if (tuned := arm != BASE) not in loaded:
                    say(f"measuring {'the result' if tuned else 'the base'} ...")
                    loaded.clear()  # one model at a time
                    model, tokenizer = _student(recipe, stages if tuned else 0, trainable=False)
                    loaded[tuned] = model.to(PartialState().device), tokenizer
                with at_scale(loaded[tuned][0], scale):
                    scores = dict(losses(recipe, *loaded[tuned], split))
            spent = {} if arm == BASE else cost
            lost = [name for name, score in scores.items() if not math.isfinite(score.value)]
            known[key, split] = Entry(
                recipe.experiment, arm, chosen, recipe.seed, split, scores, spent,
                status="failed" if lost else "done", error=f"{', '.join(lost)} not finite: diverged" if lost else None,
            )  # fmt: skip
            ledger.append(known[key, split])
        entries.append(known[key, split])
    return entries


def losses(recipe: Recipe, model: Any, tokenizer: Any, split: str) -> Iterator[tuple[str, Score]]:
    """Yield the scores of a model on a split of `evaluate`, by name.

    Raises:
        NotYetSupported: for prompt learning.
        WrongSetup: if rows cannot be read.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise NotYetSupported("evaluate: prompt learning is not measured here; use the trainer's own eval_data.")
    options = recipe.stages[-1].options
    for name, data in recipe.measured[split].items():
        refuse_format(data, "text")  # of a hub name nothing was known when the recipe was read
        yield (
            f"{name}_loss",
            mean_loss(
                model, tokenizer, data,
                batch_size=options.get("per_device_eval_batch_size", 8), max_length=options.get("max_length") or 1024,
            ),
        )  # fmt: skip


def settings_of(recipe: Recipe) -> dict[str, JSON]:
    """Return what a person set by hand, flat, as the ledger records it."""
    found: dict[str, JSON] = {"model": recipe.model.name}
    found |= {f"adapter.{key}": _plain(value) for key, value in recipe.model.adapter.items() if key != "task_type"}
    for number, stage in enumerate(recipe.stages):
        prefix = f"{number + 1}." if len(recipe.stages) > 1 else ""
        found |= {f"{prefix}{key}": _plain(value) for key, value in stage.options.items()}
        found |= {f"{prefix}replay": stage.replay} if stage.replay else {}
        found |= {f"{prefix}{m.name}": m.describe() for m in stage.methods if m.strength}
    return found


def _plain(value: Any) -> JSON:
    return value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)
