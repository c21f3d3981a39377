"""YAML that remembers its lines, so that every fault of a recipe can be shown where it stands, all of them at once.

`read` gives a tree of `Node`s, `Section` asks a mapping for its keys one by one, and what nobody asked for is a fault
with a guess at what was meant. Read next: `config`, which asks the questions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from ..core.errors import ConfigError

Value: TypeAlias = "dict[str, Node] | list[Node] | str | int | float | bool | None"


@dataclass(frozen=True)
class Node:
    """A value of a recipe and the line it stands on (from 1)."""

    value: Value
    line: int

    def plain(self) -> Any:
        """Return the value as dicts, lists and scalars, without lines."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


@dataclass
class Faults:
    """Collects what is wrong, with lines, and raises it all at once."""

    found: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line: int, fault: str) -> None:
        """Note a fault; multi-line messages of other libraries are folded into one line."""
        self.found.append((line, " ".join(fault.split())))

    def raise_if_any(self, subject: str) -> None:
        """Raise everything noted so far, in the order of lines.

        Raises:
            ConfigError: if there is anything.
        """
        if self.found:
            raise ConfigError(subject, [f"line {line}: {fault}" for line, fault in sorted(set(self.found))])


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `2e-4` as a string, `on` as true and a date as a date; recipes mean a number and two words."""


_YAML = "tag:yaml.org,2002:"
_OURS = {f"{_YAML}{kind}" for kind in ("float", "bool", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OURS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = re.compile(r"^[-+]?(\.\d+|\d+\.\d*|\d+(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$")
_Loader.add_implicit_resolver(f"{_YAML}float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver(f"{_YAML}bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))


def read(path: Path, faults: Faults) -> Node | None:
    """Return the tree of a YAML file; None, with the fault noted, if it is not YAML or is empty."""
    loader = _Loader(path.read_text(encoding="utf-8"))
    try:
        root = loader.get_single_node()
        if root is None:
            faults.add(1, "the recipe is empty: it needs at least model, stages and output")
            return None
        return _convert(root, loader, faults)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        faults.add(line, f"this is not YAML: {error.problem or error}")
        return None
    finally:
        loader.dispose()


def _convert(node: yaml.Node, loader: _Loader, faults: Faults) -> Node:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        return Node([_convert(item, loader, faults) for item in node.value], line)
    if not isinstance(node, yaml.MappingNode):
        return Node(loader.construct_object(node), line)
    found: dict[str, Node] = {}
    for key_node, value in node.value:
        key, key_line = str(key_node.value), key_node.start_mark.line + 1
        if key == "<<":
            faults.add(key_line, "merge keys (<<) are not read in recipes: write the settings out")
        elif key in found:
            faults.add(key_line, f"{key!r} is given twice (first on line {found[key].line}): keep one")
        else:
            found[key] = _convert(value, loader, faults)
            if isinstance(value, yaml.MappingNode | yaml.SequenceNode):
                found[key] = Node(found[key].value, key_line)
    return Node(found, line)


def guess(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?`, or nothing where no known name is near.

    >>> guess("learning_rte", ["learning_rate", "seed"])
    " Did you mean 'learning_rate'?"
    """
    close = get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


class Section:
    """A mapping of the recipe whose keys are asked for one by one.

    Args:
        node: the mapping; anything else is a fault, and the section is then empty.
        name: what it is called in messages.
        faults: where faults go.
    """

    def __init__(self, node: Node, name: str, faults: Faults) -> None:
        self.line, self.name, self.faults = node.line, name, faults
        self._asked: set[str] = set()
        self._left: dict[str, Node] = dict(node.value) if isinstance(node.value, dict) else {}
        if not isinstance(node.value, dict):
            faults.add(node.line, f"{name} must be a mapping of settings, got {node.plain()!r}")

    def node(self, key: str) -> Node | None:
        """Take the node of a key, or None if it is absent (or empty)."""
        self._asked.add(key)
        node = self._left.pop(key, None)
        return None if node is None or node.value is None else node

    def text(self, key: str, default: str | None = None, *, required: str = "") -> str:
        """Take a string; where it is absent and `required` says why it is needed, that is a fault."""
        node = self.node(key)
        if node is None:
            if required:
                self.faults.add(self.line, f"{self.name} needs {key!r}: {required}")
            return default or ""
        if not isinstance(node.value, str) or not node.value.strip():
            self.faults.add(node.line, f"{key} must be a string, got {node.plain()!r}")
            return default or ""
        return node.value

    def whole(self, key: str, default: int | None = None, *, least: int = 0) -> int | None:
        """Take a whole number of at least `least`."""
        node = self.node(key)
        if node is None:
            return default
        if not isinstance(node.value, int) or isinstance(node.value, bool) or node.value < least:
            self.faults.add(node.line, f"{key} must be a whole number >= {least}, got {node.plain()!r}")
            return default
        return node.value

    def items(self, key: str) -> list[Node]:
        """Take a list, empty where it is absent."""
        node = self.node(key)
        if node is not None and not isinstance(node.value, list):
            self.faults.add(node.line, f"{key} must be a list, got {node.plain()!r}")
        return node.value if node is not None and isinstance(node.value, list) else []

    def rest(self) -> dict[str, Node]:
        """Take all keys that have not been asked for."""
        left, self._left = self._left, {}
        return left

    def close(self) -> None:
        """Note a fault for every key that nobody asked for."""
        for key, node in self.rest().items():
            known = f" {self.name} has: {', '.join(sorted(self._asked))}."
            self.faults.add(node.line, f"unknown key {key!r} in {self.name}.{guess(key, self._asked) or known}")
