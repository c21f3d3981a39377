"""Finding tasks of lm-eval, its own and those of a folder, and naming what they ask.

Task files may run Python by `!function`, from lm-eval's package or the folder that was named. Code from the hub is not
run: neither loading scripts of data sets, which `datasets` has given up, nor metrics. Read next:
`holdfast.drift.probes.lm_eval_host`.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..probe import ProbeError, digest_of
from .lm_eval_host import lm_eval_part, replaced

__all__ = ["digest_of_task", "load_tasks", "no_code_from_the_hub"]


def load_tasks(
    names: Sequence[str], folder: Path | None, said: Sequence[str], refused: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The tasks and groups of these names, or all that is wrong with them.

    Args:
        names: of tasks, groups or tags.
        folder: with task files that come before lm-eval's.
        said: lm-eval's log lines, as `quiet` gives them.
        refused: metrics from the hub, as `no_code_from_the_hub` gives them.

    Raises:
        ProbeError: names every task that is unknown or cannot be loaded.
    """
    manager = _manager(names, folder, said)
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
    faults = []
    for name in names:
        if name not in manager.task_index:
            close = get_close_matches(name, manager.all_tasks, n=3)
            meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
            where = f", nor in {folder}" if folder else " (a task file of your own needs include_path)"
            faults.append(f"there is no task {name!r} in lm-eval {lm_eval_part().__version__}{where}.{meant}")
            continue
        try:
            part = manager.load([name])
        except Exception as error:  # task files may run any code and ask for any data set
            faults.append(f"{name} cannot be loaded: {type(error).__name__}: {error}")
            continue
        twice = [task for task in part["tasks"] if task in loaded["tasks"]]
        faults += [f"{task} is in {name} too, which was asked for beside it" for task in twice]
        loaded["tasks"] |= part["tasks"]
        loaded["groups"] |= part.get("groups", {})
    faults += [f"the metric {metric!r} is code from the hub, which is not run" for metric in refused]
    if faults:
        raise ProbeError("These tasks of lm-eval cannot be measured:", faults)
    return loaded


def _manager(names: Sequence[str], folder: Path | None, said: Sequence[str]) -> Any:
    """lm-eval's list of tasks. Reading its own fifteen thousand takes ten seconds, and is left out if not needed."""
    manager = lm_eval_part(".tasks").TaskManager
    if folder:
        logger = logging.getLogger("lm_eval.tasks._index")
        before = logger.level
        logger.setLevel(logging.DEBUG)  # that a file cannot be read is not said above this level
        try:
            own = manager(include_path=str(folder), include_defaults=False)
        finally:
            logger.setLevel(before)
        if broken := [message.removeprefix("Skip ") for message in said if message.startswith("Skip ")]:
            raise ProbeError(f"Some task files in {folder} cannot be read:", broken)
        if all(name in own.all_subtasks for name in names):
            return own
    return manager(include_path=str(folder) if folder else None)


def digest_of_task(task: Any) -> str:
    """Names what is asked and how it is judged: every request, every right answer, the metrics and the filters."""
    asked = [[instance.doc_id, instance.args, task.doc_to_target(instance.doc)] for instance in task.instances]
    config = task.dump_config()
    judged = [config.get(part) for part in ("output_type", "metric_list", "filter_list", "repeats")]
    text = json.dumps([asked, judged], default=str, sort_keys=True)
    return digest_of(re.sub(r" at 0x[0-9a-f]+", "", text))  # where a function lies in memory changes from run to run


@contextmanager
def no_code_from_the_hub() -> Iterator[list[str]]:
    """Metrics that lm-eval would fetch from the hub as code are refused; yields the list of their names."""
    refused: list[str] = []

    def refuse(name: str, *_: object, **__: object) -> None:
        refused.append(name)
        raise ImportError(f"the metric {name!r} is code from the hub")

    with replaced(importlib.import_module("evaluate"), "load", refuse):
        yield refused
