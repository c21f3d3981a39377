"""Bars for what takes long, where there is tqdm and the host shows any."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ..core.fisher import Progress, unseen

T = TypeVar("T")
log = logging.getLogger(__name__)


def progress_bar(shown: bool) -> Progress:
    """Return what shows a bar while something long is gone through; else what shows nothing."""
    tqdm = _tqdm()
    if tqdm is None:
        return unseen

    def bar(iterable: Iterable[T], description: str) -> Iterable[T]:
        seen: Iterable[T] = tqdm(iterable, desc=description, disable=not shown, leave=False)
        return seen

    return bar


@contextmanager
def counting(
    total: int, description: str, *, shown: bool
) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
    """Yield what moves a bar of so many steps, and what prints a line above it; the line is logged if none is shown."""
    tqdm = _tqdm() if shown else None
    if tqdm is None:
        yield lambda n: None, log.info
        return
    with tqdm(total=total, desc=description, leave=False) as bar:

        def tick(n: int) -> None:
            bar.update(n)

        yield tick, bar.write


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return None
    return tqdm
