"""What a doctor finds: one line for each thing that was looked at, and whether it is in order.

Errors that other rooms raise on purpose become faults with their own words, so that a recipe is told here what it would
be told when its run begins. Read next: `doctor`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from ..core.errors import HoldfastError
from ..retain.pool import PoolError

Status = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        about: what was looked at: `model`, `data`, `stage 1`, ...
        status: `ok`; `warning`: it may be meant, or was not proven; `fault`: the run would fail or be wrong.
        text: what was found; of a fault also why, and what to do.
    """

    about: str
    status: Status
    text: str


class Findings(list[Finding]):
    """Findings in the order in which they came.

    >>> found = Findings()
    >>> found.fault("model", "it is not there")
    >>> found.faulty
    True
    """

    def ok(self, about: str, text: str) -> None:
        """Note what is in order."""
        self.append(Finding(about, "ok", _line(text)))

    def warn(self, about: str, text: str) -> None:
        """Note what may not be meant, or could not be proven."""
        self.append(Finding(about, "warning", _line(text)))

    def fault(self, about: str, text: str) -> None:
        """Note what would make the run fail, or be wrong; what several checks come upon is told once."""
        if all(found.text != _line(text) for found in self):
            self.append(Finding(about, "fault", _line(text)))

    @property
    def faulty(self) -> bool:
        """Whether there is a fault."""
        return any(found.status == "fault" for found in self)

    @contextmanager
    def noting(self, about: str) -> Iterator[None]:
        """Context: an error that holdfast raises on purpose is a fault; what follows it in the block is left out."""
        try:
            yield
        except (HoldfastError, PoolError) as error:
            self.fault(about, str(error))


def _line(text: str) -> str:
    return " ".join(text.split())
