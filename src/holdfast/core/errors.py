"""One tree of errors; every message says what happened, why, and what to do.

The branches tell the reader how permanent the problem is: `NeverSupported` cannot work by construction,
`NotYetSupported` could but does not, `WrongSetup` works once the setup is corrected, and `ConfigError` lists all
faults of a configuration at once.
"""

from __future__ import annotations

from collections.abc import Iterable


class HoldfastError(Exception):
    """The root of every error that holdfast raises on purpose."""


class NeverSupported(HoldfastError):
    """The combination cannot work by construction; the message names the way out."""


class NotYetSupported(HoldfastError):
    """The combination could work but has not been built or tested; the message says what does work."""


class WrongSetup(HoldfastError):
    """The setup as given would compute something wrong; the message says what to change."""


class ConfigError(HoldfastError, ValueError):
    """One or more faulty settings, all reported together.

    >>> raise ConfigError("TargetMaskedKL", ["strength must be >= 0, got -1", "positions must be one of ..."])
    Traceback (most recent call last):
    ...
    holdfast.core.errors.ConfigError: TargetMaskedKL has 2 faults:
      - strength must be >= 0, got -1
      - positions must be one of ...
    """

    def __init__(self, subject: str, faults: Iterable[str]) -> None:
        self.subject = subject
        self.faults = tuple(faults)
        count = f"{len(self.faults)} faults" if len(self.faults) != 1 else "a fault"
        super().__init__(f"{subject} has {count}:\n" + "\n".join(f"  - {fault}" for fault in self.faults))
