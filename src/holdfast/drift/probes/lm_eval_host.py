"""How lm-eval is run: around a model that is already there, quietly, with its own seeds, and leaving no trace.

    log p(choice | prompt)        as lm-eval computes it, batch by batch
    greedy answer                 as lm-eval writes it; where two tokens are nearly tied, the row alone decides

Read next: `holdfast.drift.probes.lm_eval_items`, what its numbers become.
"""

from __future__ import annotations

import copy
import importlib
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..generation import MARGIN
from ..probe import ProbeError, Tick

if TYPE_CHECKING:
    from ..models import Models

__all__ = ["SEEDS", "Done", "host_of", "lm_eval_part", "quiet", "replaced", "seeded"]

SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""Those of lm-eval's own command line."""


def lm_eval_part(name: str = "") -> Any:
    """A module of lm-eval.

    Args:
        name: of the module, from its dot on; empty: lm-eval itself.

    Raises:
        ProbeError: if it, or what it needs, is not installed.
    """
    try:
        return importlib.import_module(f"lm_eval{name}")
    except ImportError as error:
        what = f"This needs lm-eval, and {error.name or 'a part of it'} is not installed: "
        raise ProbeError(what + "pip install 'holdfast[lm-eval]'") from error


def host_of(model: Any, models: Models, done: Done) -> Any:
    """lm-eval's wrapper around the model that answers now, with a copy of the tokenizer: lm-eval sets its padding."""
    host = lm_eval_part(".models.huggingface").HFLM(
        pretrained=model, tokenizer=copy.deepcopy(models.tokenizer), batch_size=models.batch_size, backend="causal"
    )
    host.set_cache_hook(done)
    write = host._model_generate

    def written(context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor, **kwargs: Any) -> Tensor:
        greedy = not kwargs.get("do_sample") and not kwargs.get("temperature") and kwargs.get("num_beams", 1) == 1
        ties = [_Ties(write, (attention_mask == 0).sum(1).tolist(), kwargs, model.dtype)] if greedy else []
        answers: Tensor = write(
            context, max_length, stop, attention_mask=attention_mask, logits_processor=ties, **kwargs
        )
        return answers

    host._model_generate = written
    return host


class _Ties:
    """A logits processor: where two tokens are nearly tied, the row is asked alone, so that no batch decides.

    As in `holdfast.drift.generation`, but with whatever penalties lm-eval and the model's own settings bring.
    """

    def __init__(
        self, write: Callable[..., Tensor], padding: Sequence[int], kwargs: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        self.write, self.padding, self.kwargs, self.margin = write, padding, dict(kwargs), MARGIN.get(dtype, 5e-2)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        sure = logits.float()
        best = sure.topk(2, dim=-1).values
        largest = sure.where(sure.isfinite(), 0).abs().amax(dim=-1)
        for row in (best[:, 0] - best[:, 1] < self.margin * largest).nonzero().flatten().tolist():
            alone = ids[row : row + 1, self.padding[row] :]
            mask = torch.ones_like(alone)
            token = self.write(alone, alone.shape[1] + 1, [], attention_mask=mask, **self.kwargs)[0, -1]
            logits[row] = -torch.inf
            logits[row, token] = 0.0
        return logits


class Done:
    """Counts requests as lm-eval finishes them, and tells how many documents that makes.

    Args:
        tick: to be told.
        size: documents in all.
        tasks: of lm-eval, by name; their requests are known once it has built them.
    """

    def __init__(self, tick: Tick, size: int, tasks: Mapping[str, Any]) -> None:
        self.tick, self.size, self.tasks, self.requests, self.told = tick, size, tasks, 0, 0

    def add_partial(self, attr: str, req: object, res: object) -> None:
        """Called by lm-eval after each request, as it would fill a cache."""
        self.requests += 1
        asked = sum(len(task.instances) * (task.get_config("repeats") or 1) for task in self.tasks.values())
        self._tell(min(self.size, self.size * self.requests // asked))

    def finish(self) -> None:
        """Tell what is left: lm-eval asks equal requests once."""
        self._tell(self.size)

    def _tell(self, documents: int) -> None:
        if documents > self.told:
            self.tick(documents - self.told)
            self.told = documents


@contextmanager
def seeded() -> Iterator[None]:
    """lm-eval's own seeds inside, the caller's random numbers as they were afterwards."""
    import numpy

    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            random.seed(SEEDS["python"])
            numpy.random.seed(SEEDS["numpy"])
            torch.manual_seed(SEEDS["torch"])
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Neither bars nor log lines of lm-eval; yields the list in which its log lines are kept."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    tqdm = importlib.import_module("tqdm").tqdm

    def silent(*args: Any, **kwargs: Any) -> Any:
        return tqdm(*args, **kwargs | {"disable": True})

    with ExitStack() as until_here:
        for part in (".api.task", ".api.model", ".models.huggingface"):
            until_here.enter_context(replaced(lm_eval_part(part), "tqdm", silent))
        if not are_progress_bars_disabled():
            until_here.callback(enable_progress_bars)
            disable_progress_bars()
        logger, kept = logging.getLogger("lm_eval"), _Kept()
        until_here.callback(logger.setLevel, logger.level)
        until_here.enter_context(replaced(logger, "propagate", False))
        until_here.callback(logger.removeHandler, kept)
        logger.addHandler(kept)
        logger.setLevel(logging.WARNING)
        yield kept.said


class _Kept(logging.Handler):
    """Keeps log lines instead of showing them."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Another value under a name of a module or object, inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
