"""Several processes for work that takes long: outcomes as they come, one count of what is done, no worker left behind.

A worker is spawned, has one thread where there are several, leaves Ctrl-C to its parent, and ends when its parent ends,
however that happens. An exception in a worker comes back as `Failed` and stops nobody else. Read next: `demo`,
`compare`, whose runs go through here.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as NotYet
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import TypeVar

from ..core.errors import HoldfastError, WrongSetup

K = TypeVar("K")
R = TypeVar("R")
MOST = 8
_done: Synchronized[float] | None = None


@dataclass(frozen=True)
class Failed:
    """What came instead of a result: the error in a sentence, and where it happened."""

    error: str
    trace: str


def processes_for(asked: int) -> int:
    """Return how many processes there will be: as asked, else one per core, at most 8; with an accelerator, one.

    >>> processes_for(3)
    3
    """
    if asked:
        return asked
    import torch

    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return 1
    return min(os.cpu_count() or 1, MOST)


def count(amount: float = 1.0) -> None:
    """In a worker, add to what is done; anywhere else, nothing."""
    if _done is not None:
        with _done.get_lock():
            _done.value += amount


def performed(
    tasks: Mapping[K, Callable[[], R]],
    processes: int,
    *,
    told: Callable[[float], None] = lambda done: None,
    log: Callable[[K], Path | None] = lambda key: None,
) -> Iterator[tuple[K, R | Failed]]:
    """Yield tasks with what they returned, as they end.

    Args:
        tasks: by key, what can be pickled and called.
        processes: how many at a time; several have one thread each.
        told: called twice a second with the sum of all `count`s.
        log: of a key, the file to which everything goes that its task prints; None: to the terminal.

    Raises:
        WrongSetup: if a worker was ended from outside.
    """
    context, before = multiprocessing.get_context("spawn"), {*multiprocessing.active_children()}
    done: Synchronized[float] = context.Value("d", 0.0)
    pool = ProcessPoolExecutor(
        min(processes, max(len(tasks), 1)), context, initializer=_start_worker, initargs=(done, processes > 1)
    )
    waiting: dict[Future[R | Failed], K] = {}
    try:
        waiting |= {pool.submit(_safely, task, log(key)): key for key, task in tasks.items()}
        while waiting:
            try:
                for future in as_completed(list(waiting), timeout=0.5):
                    yield waiting.pop(future), future.result()
                    told(done.value)
            except NotYet:
                pass
            told(done.value)
    except BrokenProcessPool as error:
        raise WrongSetup(
            "A worker process was ended from outside; where memory runs out, the system does that. What is finished is "
            "kept: start again, with fewer --processes if it was memory."
        ) from error
    finally:
        if waiting:  # an error, or Ctrl-C: nobody waits for the rest
            for child in {*multiprocessing.active_children()} - before:
                child.terminate()
        pool.shutdown(wait=not waiting, cancel_futures=True)


def _safely(task: Callable[[], R], log: Path | None) -> R | Failed:
    """Do it, in a worker; what it prints goes to its log."""
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            for stream in (1, 2):  # also what libraries write without Python
                os.dup2(file.fileno(), stream)
    try:
        return task()
    except Exception as error:
        trace = traceback.format_exc()
        if log is not None:
            print(trace, flush=True)
        text = str(error) if isinstance(error, HoldfastError) else f"{type(error).__name__}: {error}"
        return Failed(text, trace)


def _start_worker(done: Synchronized[float], single: bool) -> None:
    global _done
    _done = done
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if single:  # several threads on a small model are slower than one, and in several processes far slower
        os.environ["OMP_NUM_THREADS"] = "1"
        import torch

        torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # hosts' deprecations are not for the reader of a table
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def _end_with_parent() -> None:
    """Wait for the parent to end, however it ends, and end with it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
