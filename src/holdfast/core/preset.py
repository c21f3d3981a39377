"""A paper's methods as one list, and the retain rows that they were given with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .errors import WrongSetup
from .method import Method
from .retain import ONLY, RetainRows, Rows


class Preset(list[Method]):
    """A list of methods that may bring retain rows of its own.

    Joined to other methods it becomes a plain list without them: then hand the rows to the host, `retain={...}`.

    Args:
        methods: in their order.
        retain: rows of the retain sets that they name.
    """

    def __init__(self, methods: Iterable[Method], retain: Mapping[str, Rows] | None = None) -> None:
        super().__init__(methods)
        self.retain = dict(retain or {})


def with_own_retain(methods: Sequence[Method], retain: RetainRows) -> RetainRows:
    """Return what a host was given as retain rows and what the methods brought along, as sets by name.

    Raises:
        WrongSetup: if a set comes from both sides.
    """
    if not isinstance(methods, Preset) or not methods.retain:
        return retain
    given: dict[str, Rows] = dict(retain) if isinstance(retain, Mapping) else {ONLY: retain} if _some(retain) else {}
    if twice := sorted(given.keys() & methods.retain.keys()):
        raise WrongSetup(
            f"The retain set {twice[0]!r} comes with the methods and in retain=... too: give it once, or rename one."
        )
    return methods.retain | given


def _some(rows: RetainRows) -> bool:
    return not isinstance(rows, Sequence) or len(rows) > 0
