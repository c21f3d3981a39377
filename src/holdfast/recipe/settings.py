"""Settings of other people's dataclasses (SFTConfig, DPOConfig, LoraConfig, methods) checked before a run starts.

A misspelt or mistyped option should cost a second, not an hour, so names and types are compared with the dataclass's
own fields, and then the object is built to hear what it has to say itself.
"""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..analysis.scores import KNOWN, find
from ..core.budget_settings import parted
from ..core.errors import ConfigError
from .lines import Faults, Node, guess

if TYPE_CHECKING:
    from ..core.method import Method


WORDS: Mapping[Any, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a string", list: "a list",
    tuple: "a list", dict: "a mapping", type(None): "empty",
}  # fmt: skip


def fits(value: object, hint: Any) -> bool:
    """Return whether a value read from YAML may go into a field of this type; unknown types are given the benefit.

    >>> fits(1, float), fits("a", int), fits(None, int | None), fits("sigmoid", list[str]), fits(True, int)
    (True, False, True, True, False)
    """
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in get_args(hint))
    if origin is Literal:  # by type only: PEFT's literals list a part of what it takes
        return any(type(value) is type(allowed) for allowed in get_args(hint))
    if hint is Any or isinstance(hint, typing.TypeVar | typing.ForwardRef | str):
        return True
    if hint is type(None) or hint is None:
        return value is None
    kind = origin or hint
    if kind in (int, float):
        return isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    if kind in (bool, str, dict):
        return isinstance(value, kind)
    if kind in (list, tuple, set):
        return isinstance(value, list | str)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return value in [member.value for member in kind]
    return isinstance(value, dict) if is_dataclass(kind) else True


def spelt(hint: Any) -> str:
    """Return a type in words.

    >>> spelt(float | None), spelt(Literal["a", "b"])
    ('a number or empty', "'a' or 'b'")
    """
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(spelt(part) for part in get_args(hint)))
    if origin is Literal:
        return " or ".join(repr(value) for value in get_args(hint))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    return WORDS.get(origin or hint, str(getattr(hint, "__name__", hint)))


def checked(
    given: Mapping[str, Node], config_class: type, name: str, faults: Faults, refused: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the settings as plain values, those that are fields of `config_class` and of the right type.

    Args:
        given: what the recipe says.
        config_class: the dataclass they are for.
        name: what it is called in messages.
        faults: where faults go.
        refused: settings that the recipe sets elsewhere, and where.
    """
    hints = get_type_hints(config_class)
    known = {field.name for field in fields(config_class) if field.init}
    settings = {}
    for key, node in given.items():
        value = node.plain()
        if refused and key in refused:
            faults.add(node.line, f"{key} does not belong here: {refused[key]}")
        elif key not in known:
            faults.add(node.line, f"unknown option {key!r} of {name}.{guess(key, known)}")
        elif not fits(value, hints[key]):
            faults.add(node.line, f"{key} must be {spelt(hints[key])}, got {value!r}")
        else:
            settings[key] = _built(value, hints[key])
    return settings


def _built(value: Any, hint: Any) -> Any:
    """Make the nested dataclass (PEFT's `eva_config`, say) that a mapping stands for."""
    if isinstance(value, dict):
        for part in get_args(hint) or (hint,):
            if is_dataclass(part) and isinstance(part, type):
                try:
                    return part(**value)
                except (TypeError, ValueError):
                    return value  # the outer class says what is wrong
    return value


def method(node: Node, faults: Faults) -> list[Method]:
    """Return the method, or the preset's list of methods, that one item of `methods:` stands for."""
    from ..core import registry

    if isinstance(node.value, str):
        name, given = node.value, Node({}, node.line)
    elif isinstance(node.value, dict) and len(node.value) == 1:
        (name, given) = next(iter(node.value.items()))
        given = Node({}, given.line) if given.value is None else given
    else:
        faults.add(node.line, f"a method is a name or {{name: {{settings}}}}, got {node.plain()!r}")
        return []
    if not isinstance(given.value, dict):
        faults.add(given.line, f"settings of {name} must be a mapping, got {given.plain()!r}")
        return []
    try:
        config_class = registry.get(name)
    except ConfigError as error:
        if (preset := _preset(name)) is not None:
            return _from_preset(preset, name, given, faults)
        for fault in error.faults:
            faults.add(node.line, fault)
        return []
    known = {field.name for field in fields(config_class) if field.init}
    for key in given.value.keys() - known:
        faults.add(given.value[key].line, f"unknown setting {key!r} of {name}.{guess(key, known)}")
    try:
        made = config_class(**{key: value.plain() for key, value in given.value.items() if key in known})
        score = str(parted(made.budget)[0])
        if score and find(score) is None:
            said = f"{name}: budget is on {score!r}, a score that nothing gives.{guess(score, KNOWN)}"
            faults.add(given.value["budget"].line, said)
        return [made]
    except ConfigError as error:
        for fault in error.faults:
            about = given.value.get(fault.split()[0].strip(":,"))
            faults.add(about.line if about else given.line, f"{name}: {fault}")
    except TypeError as error:
        faults.add(given.line, f"{name}: {error}")
    return []


def _preset(name: str) -> Any:
    from ..methods import presets

    found = getattr(presets, name, None)
    return found if callable(found) and getattr(found, "__module__", "") == presets.__name__ else None


def _from_preset(preset: Any, name: str, given: Node, faults: Faults) -> list[Method]:
    try:
        return list(preset(**given.plain()))
    except ConfigError as error:
        for fault in error.faults:
            faults.add(given.line, f"{name}: {fault}")
    except TypeError as error:
        faults.add(given.line, f"{name}: {error}")
    return []


def default_of(field: Any) -> str:
    """Return a dataclass field's default as text."""
    if field.default is not MISSING:
        return repr(field.default)
    return "made anew" if field.default_factory is not MISSING else "required"
