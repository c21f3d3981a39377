"""Any task of lm-eval, asked of one side at a time: adapters are switched and never merged, and every item is kept.

    value = aggregate over documents of  metric(answer of this side, document)

lm-eval reports the aggregate. Here each document's own number is kept too, in the order of the documents, so that base
and tuned are compared pair by pair. What cannot be guaranteed is in docs/lm-eval.md. Read next:
`holdfast.drift.probes.lm_eval_tasks`, how tasks are found.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..entry import JSON
from ..probe import Found, Probe, ProbeError, Tick
from .lm_eval_host import SEEDS, Done, host_of, lm_eval_part, quiet, seeded
from .lm_eval_items import found_by
from .lm_eval_tasks import digest_of_task, load_tasks, no_code_from_the_hub

if TYPE_CHECKING:
    from ..models import Models

__all__ = ["LmEval"]


class LmEval(Probe):
    """Tasks of lm-eval, item by item: `lm_eval.<task>.<metric>`, or `lm_eval_loss...` where less is better.

    Args:
        tasks: names of tasks, groups or tags, as `lm-eval ls tasks` lists them.
        include_path: a folder with task files of your own, which come before lm-eval's. Their `!function` tags, and
            those of lm-eval's own tasks, run Python from these folders.
        num_fewshot: examples before each question; None: what the task says.
        limit: only the first documents of each task; None: all.
        apply_chat_template: whether questions are put into the chat template; published results mostly do not.

    Raises:
        ProbeError: if there are no tasks, or a setting is not possible. Tasks are looked up when they are first needed.
    """

    name = "lm_eval"
    note = (
        "Log-likelihoods differ by rounding with the batch size, so near ties between choices may fall otherwise; "
        "tasks that sample differ between sides by chance too."
    )

    def __init__(
        self,
        tasks: Sequence[str],
        include_path: str | Path | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
        apply_chat_template: bool = False,
    ) -> None:
        faults = []
        if isinstance(tasks, str) or not tasks or not all(isinstance(task, str) for task in tasks):
            faults.append(f"tasks must be a list of names, such as ['gsm8k'], got {tasks!r:.60}")
        elif repeated := sorted({task for task in tasks if list(tasks).count(task) > 1}):
            faults.append(f"these tasks are there twice: {', '.join(repeated)}")
        if include_path is not None and not Path(include_path).is_dir():
            faults.append(f"include_path is not a folder: {include_path}")
        if num_fewshot is not None and num_fewshot < 0:
            faults.append(f"num_fewshot must be at least 0, got {num_fewshot}")
        if limit is not None and (limit < 1 or limit != int(limit)):
            faults.append(f"limit is a number of documents, at least 1, got {limit}")
        if faults:
            raise ProbeError("lm-eval cannot be asked this:", faults)
        self.tasks, self.num_fewshot, self.limit = tuple(tasks), num_fewshot, limit
        self.include_path = None if include_path is None else Path(include_path).resolve()
        self.apply_chat_template = apply_chat_template

    @property
    def size(self) -> int:
        """Documents of all tasks."""
        return sum(len({instance.doc_id for instance in task.instances}) for task in self._loaded["tasks"].values())

    @property
    def identity(self) -> Mapping[str, JSON]:
        """lm-eval's version, the settings, and per task its version and a digest of prompts, right answers, metrics."""
        tasks = self._loaded["tasks"]
        return {
            "probe": self.name,
            "lm_eval": lm_eval_part().__version__,
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "apply_chat_template": self.apply_chat_template,
            "tasks": {name: [str(task.VERSION), self._prompts[name]] for name, task in tasks.items()},
        }

    @cached_property
    def _loaded(self) -> dict[str, dict[str, Any]]:
        """The tasks and groups, with requests built once without a model, which tells their items."""
        with quiet() as said, seeded(), no_code_from_the_hub() as refused:
            loaded = load_tasks(self.tasks, self.include_path, said, refused)
            faults = [fault for name, task in loaded["tasks"].items() for fault in self._faults(name, task)]
            if faults:
                raise ProbeError("These tasks of lm-eval cannot be measured:", faults)
            for name, task in loaded["tasks"].items():
                if self.num_fewshot is not None or task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=self.num_fewshot or 0)
                task.set_fewshot_seed(seed=SEEDS["fewshot"])
                try:
                    task.build_all_requests(limit=self.limit)
                except (AssertionError, ValueError, KeyError) as error:
                    raise ProbeError(f"lm-eval cannot build the prompts of {name}: {error!r}") from error
            self._prompts = {name: digest_of_task(task) for name, task in loaded["tasks"].items()}
        return loaded

    def _faults(self, name: str, task: Any) -> Iterator[str]:
        if task.get_config("num_fewshot") == 0 and self.num_fewshot:
            yield f"{name} is fixed to 0 shots, and lm-eval would ignore num_fewshot={self.num_fewshot}: leave it out"
        if getattr(task, "UNSAFE_CODE", False):
            yield f"{name} runs code that the model writes; holdfast does not: run it with lm-eval in a sandbox"
        if getattr(task, "MULTIMODAL", False):
            yield f"{name} shows images or plays sounds; these models read text alone"
        for metric, higher in task.higher_is_better().items():
            if not isinstance(higher, bool):
                yield f"{name}: no higher_is_better is known for {metric!r}: set it in the task's metric_list"

    def measure(self, models: Models, side: str, tick: Tick) -> Found:
        """One evaluation of one side; the caller's random numbers are left as they were."""
        if self.apply_chat_template and not models.tokenizer.chat_template:
            raise ProbeError("apply_chat_template=True, but the tokenizer has no chat template: leave it out")
        tasks = self._loaded["tasks"]
        done = Done(tick, self.size, tasks)
        with quiet() as said, seeded(), models.on(side) as model:
            for task in tasks.values():
                task.set_fewshot_seed(seed=SEEDS["fewshot"])
            try:
                results = lm_eval_part(".evaluator").evaluate(
                    host_of(model, models, done),
                    self._loaded,
                    limit=self.limit,
                    bootstrap_iters=0,
                    apply_chat_template=self.apply_chat_template,
                    fewshot_as_multiturn=self.apply_chat_template,
                )
            except (AssertionError, ValueError) as error:
                why = str(error) or traceback.extract_tb(error.__traceback__)[-1].line  # a bare assert says no more
                raise ProbeError(f"lm-eval could not evaluate {', '.join(tasks)}: {why}") from error
        if cut := [message for message in said if "runcat" in message]:
            what = f"lm-eval cut {len(cut)} prompts or batches on the left to fit the model. The first: {cut[0]}"
            warnings.warn(what, stacklevel=2)
        done.finish()
        return found_by(results, self._loaded, lm_eval_part().__version__)
