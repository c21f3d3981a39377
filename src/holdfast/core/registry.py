"""Names of methods: `@register("l2_sp")`, third-party entry points, and a guess when a name is misspelt."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeVar

from .errors import ConfigError

if TYPE_CHECKING:
    from .method import Method

_METHODS: dict[str, type[Method]] = {}
_Class = TypeVar("_Class", bound="type[Method]")


def register(name: str) -> Callable[[_Class], _Class]:
    """Give a method class the name that recipes, logs and `holdfast methods` use.

    Raises:
        ValueError: if another class already has the name.
    """

    def enter(cls: _Class) -> _Class:
        known = _METHODS.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"Two methods want the name {name!r}: {known.__qualname__} and {cls.__qualname__}.")
        cls.name = name
        _METHODS[name] = cls
        return cls

    return enter


@cache
def _load_all() -> None:
    import_module("holdfast.methods").load_all()
    for point in entry_points(group="holdfast.methods"):  # third parties: their module registers on import
        point.load()


def methods() -> dict[str, type[Method]]:
    """Return every known method by name, in alphabetical order."""
    _load_all()
    return dict(sorted(_METHODS.items()))


def get(name: str) -> type[Method]:
    """Return the method class called `name`.

    Raises:
        ConfigError: if there is none; the message guesses what was meant.
    """
    known = methods()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    guess = f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."
    raise ConfigError("methods", [f"Unknown method {name!r}.{guess} (holdfast methods)"])
