"""Does the host shard what methods read? From the recipe's own settings, the environment, and accelerate's config file.

The refusal is attach's own: it is asked about a host that is described, not started. Read next: `doctor_methods`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from ..core.errors import ConfigError
from ..integrations.hf_trainer import _refuse_unsound_hosts
from .config import Recipe, Stage
from .doctor_findings import Findings
from .training import training_arguments

ABOUT = "host"


def look(recipe: Recipe, launch: Path | None, found: Findings) -> None:
    """Note whether the methods of every stage work under its host.

    Args:
        recipe: to be run.
        launch: accelerate's config file with which it will be launched; None: the user's default, if there is one.
        found: where findings go.
    """
    before, environment = len(found), _environment()
    for number, stage in enumerate(recipe.stages, 1):
        options = training_arguments(stage.trainer, stage.options, recipe.output / "unused", recipe.seed)
        with found.noting(f"stage {number}: {ABOUT}"):
            _refuse(stage, _own(options, environment))
    file = launch or _default_file()
    if file is not None:
        with found.noting(ABOUT):
            _of_file(recipe, file, asked=launch is not None, found=found)
    if len(found) == before:
        found.ok(ABOUT, "one process, or replicas (DDP): nothing is sharded")


def _of_file(recipe: Recipe, file: Path, *, asked: bool, found: Findings) -> None:
    written = _read(file)
    kind = str(written.get("distributed_type", "NO"))
    sharding: Mapping[str, Any] = written.get("fsdp_config") or {}
    version = int(sharding.get("fsdp_version", sharding.get("version", 1)))
    parallel = written.get("parallelism_config") or {}
    sizes = {name.removeprefix("parallelism_config_"): value for name, value in parallel.items()}
    host = _host(
        deepspeed=kind == "DEEPSPEED", fsdp=version if kind == "FSDP" else 0, parallel=SimpleNamespace(**sizes)
    )
    own = Findings()
    for stage in recipe.stages:
        with own.noting(ABOUT):
            _refuse(stage, host)
    for text in dict.fromkeys(each.text for each in own):
        if asked:
            found.fault(ABOUT, f"{file}: {text}")
        else:
            found.warn(ABOUT, f"`accelerate launch` would take {file}: {text} `holdfast train` alone does not read it.")


def _read(file: Path) -> Mapping[str, Any]:
    try:
        written = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(str(file), [f"it cannot be read: {' '.join(str(error).split())[:200]}"]) from error
    if not isinstance(written, dict):
        raise ConfigError(str(file), ["it is no config of accelerate's: write one with `accelerate config`"])
    return written


def _default_file() -> Path | None:
    from accelerate.commands.config.config_args import default_config_file

    return Path(default_config_file) if Path(default_config_file).is_file() else None


def _environment() -> dict[str, bool | int]:
    """Return what `accelerate launch` has set for this process, if it was started so."""

    def on(name: str) -> bool:
        return os.environ.get(name, "false").lower() in ("true", "1")

    version = int(os.environ.get("FSDP_VERSION", "1"))
    return {"deepspeed": on("ACCELERATE_USE_DEEPSPEED"), "fsdp": version * on("ACCELERATE_USE_FSDP")}


def _own(options: Any, environment: Mapping[str, bool | int]) -> Any:
    """Return the host of a stage, as attach would read it off its trainer."""
    own: Mapping[str, Any] = getattr(options, "fsdp_plugin_args", None) or {}
    version = int(own.get("fsdp_version", 1)) if options.fsdp else int(environment["fsdp"])
    return _host(
        deepspeed=bool(options.deepspeed) or bool(environment["deepspeed"]),
        fsdp=version,
        parallel=options.parallelism_config,
        gpus=options.n_gpu,
    )


def _host(*, deepspeed: bool, fsdp: int, parallel: Any, gpus: int = 1) -> Any:
    """Return what the refusal reads of a trainer."""
    plugin = SimpleNamespace(fsdp_version=fsdp)
    return SimpleNamespace(
        is_deepspeed_enabled=deepspeed,
        is_fsdp_enabled=bool(fsdp),
        args=SimpleNamespace(n_gpu=gpus),
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), parallelism_config=parallel),
    )


def _refuse(stage: Stage, host: Any) -> None:
    _refuse_unsound_hosts(host, [method for method in stage.methods if method.strength])
