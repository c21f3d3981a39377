"""The grid of an arm: what it changes of the recipe, every value of every list in turn.

    {learning_rate: [1e-3, 2e-3], strength: [0.1, 1]}   ->   4 recipes, the product of its lists

A list is swept where a single value is expected; what is a list by nature (`methods`, `target_modules`) is swept by a
list of lists. It is the YAML's own tree that is changed, so a fault of any of these recipes stands on the line of its
cause. Read next: `compare_settings`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, get_type_hints

from ..drift.ledger import JSON
from .lines import Faults, Node, guess
from .model import peft_class
from .settings import fits
from .training import arguments_class

ADAPTERS = ("lora", "peft")
Change = Callable[[Node, Node], Node]
"""Makes of a recipe and a value the recipe with that value."""


@dataclass(frozen=True)
class Axis:
    """One setting of an arm: what the ledger calls it, the values that it takes in turn, and what they change."""

    name: str
    values: Sequence[Node]
    change: Change

    @property
    def recorded(self) -> bool:
        """Whether the ledger tells points apart by it, or shows it because it is short."""
        return len(self.values) > 1 or not isinstance(self.values[0].value, dict | list)


def grid(arm: Node, root: Node, faults: Faults) -> list[tuple[dict[str, JSON], Node]]:
    """Return, for every point of an arm's grid, its settings and the recipe that it makes.

    Args:
        arm: what it changes.
        root: the recipe that all arms share.
        faults: where faults go.
    """
    if not isinstance(arm.value, dict | None):
        faults.add(arm.line, f"an arm is a mapping of what it changes ({{learning_rate: [1e-3]}}), got {arm.plain()!r}")
        return []
    axes = [axis for key, node in (arm.value or {}).items() for axis in _axes(key, node, root, faults)]
    axes.sort(key=lambda axis: "strength" in axis.name.split("."))  # of methods that are set by then
    found = []
    for values in product(*(axis.values for axis in axes)):
        changed = root
        for axis, value in zip(axes, values, strict=True):
            changed = axis.change(changed, value)
        settings = {a.name: value.plain() for a, value in zip(axes, values, strict=True) if a.recorded}
        found.append((settings, changed))
    return found


def put(node: Node, path: Sequence[str | int], value: Node) -> Node:
    """Return a tree with another value at a place, and the tree that was given as it was.

    >>> tree = Node({"model": Node({"name": Node("a", 1)}, 1)}, 1)
    >>> put(tree, ("model", "lora", "r"), Node(8, 2)).plain()
    {'model': {'name': 'a', 'lora': {'r': 8}}}
    >>> tree.plain()
    {'model': {'name': 'a'}}
    """
    if not path:
        return value
    first, *rest = path
    if isinstance(node.value, list) and isinstance(first, int):
        items = list(node.value)
        items[first] = put(items[first], rest, value)
        return Node(items, node.line)
    inner = dict(node.value) if isinstance(node.value, dict) else {}
    inner[str(first)] = put(inner.get(str(first), Node({}, value.line)), rest, value)
    return Node(inner, node.line)


def inside(node: Node, path: Sequence[str | int]) -> Node | None:
    """Return what stands at a place of a tree, or None."""
    found: Node | None = node
    for key in path:
        if found is not None and isinstance(found.value, dict):
            found = found.value.get(str(key))
        elif found is not None and isinstance(found.value, list) and isinstance(key, int) and key < len(found.value):
            found = found.value[key]
        else:
            return None
    return found


def _axes(key: str, node: Node, root: Node, faults: Faults) -> Iterator[Axis]:
    stages = inside(root, ("stages",))
    last = len(stages.value) - 1 if stages is not None and isinstance(stages.value, list) else -1
    if key in ADAPTERS:
        yield from _adapter(key, node, faults)
    elif last < 0:
        return  # the recipe has no stages, and is told so
    elif key != "stages":
        yield from _of_stage(last, "", key, node, root, faults)
    elif not isinstance(node.value, dict):
        faults.add(
            node.line, f"stages of an arm are a mapping from their numbers ({{1: {{...}}}}), got {node.plain()!r}"
        )
    else:
        for number, changes in node.value.items():
            if not number.isdigit() or not 1 <= int(number) <= last + 1:
                faults.add(changes.line, f"there is no stage {number!r}: they are 1 to {last + 1}")
            elif not isinstance(changes.value, dict):
                faults.add(changes.line, f"stage {number} of an arm must be a mapping, got {changes.plain()!r}")
            else:
                for name, each in changes.value.items():
                    yield from _of_stage(int(number) - 1, f"{number}.", name, each, root, faults)


def _adapter(kind: str, node: Node, faults: Faults) -> Iterator[Axis]:
    """`lora` and `peft` change fields of the adapter; another kind takes its place, and an empty one removes it."""

    def alone(root: Node) -> Node:
        """The recipe without the other kind of adapter."""
        model = inside(root, ("model",)) or Node({}, node.line)
        fields = dict(model.value) if isinstance(model.value, dict) else {"name": model}
        return put(root, ("model",), Node({key: each for key, each in fields.items() if key not in other}, model.line))

    other = {*ADAPTERS} - {kind}
    if not isinstance(node.value, dict):  # nothing, or a fault that the model tells
        yield Axis(kind, (node,), lambda root, value: put(alone(root), ("model", kind), value))
        return
    hints = _hints(kind, node)
    yield Axis(kind, (Node({}, node.line),), lambda root, value: _with(alone(root), kind, value))
    for name, given in node.value.items():

        def change(root: Node, value: Node, name: str = name) -> Node:
            return put(root, ("model", kind, name), value)

        yield Axis(f"{kind}.{name}", _values(name, given, hints, faults), change)


def _with(root: Node, kind: str, value: Node) -> Node:
    return root if inside(root, ("model", kind)) is not None else put(root, ("model", kind), value)


def _of_stage(stage: int, prefix: str, key: str, node: Node, root: Node, faults: Faults) -> Iterator[Axis]:
    if key != "strength":
        trainer = inside(root, ("stages", stage, "trainer"))
        known = trainer is not None and trainer.value in ("sft", "dpo")
        hints = get_type_hints(arguments_class(str(trainer.value))) if known and trainer else {}
        values = _values(key, node, hints, faults)
        yield Axis(prefix + key, values, lambda recipe, value: put(recipe, ("stages", stage, key), value))
        return
    named = node.value if isinstance(node.value, dict) else {"": node}
    for method, given in named.items():

        def change(recipe: Node, value: Node, method: str = method) -> Node:
            return _strengthened(recipe, stage, method, value, faults)

        yield Axis(f"{prefix}strength{'.' * bool(method)}{method}", _values("strength", given, {}, faults), change)


def _strengthened(recipe: Node, stage: int, only: str, strength: Node, faults: Faults) -> Node:
    """The recipe whose stage has this strength in all its methods, or in the one that is named."""
    methods = inside(recipe, ("stages", stage, "methods")) or inside(recipe, ("methods",))
    items = methods.value if methods is not None and isinstance(methods.value, list) else [methods] if methods else []
    changed, names = list[Node](), list[str]()
    for item in items:
        named = item.value if isinstance(item.value, dict) and item.value else {str(item.value): Node({}, item.line)}
        name, given = next(iter(named.items()))
        names.append(name)
        if only in ("", name):
            settings = dict(given.value) if isinstance(given.value, dict) else {}
            item = Node({name: Node({**settings, "strength": strength}, item.line)}, item.line)
        changed.append(item)
    if not names:
        faults.add(
            strength.line, "strength is that of methods, and there are none here: add methods: [self_replay], say"
        )
    elif only and only not in names:
        faults.add(strength.line, f"there is no method {only!r} to give a strength; there are {', '.join(names)}."
                   + guess(only, names))  # fmt: skip
    return put(recipe, ("stages", stage, "methods"), Node(changed, strength.line))


def _values(key: str, node: Node, hints: Mapping[str, Any], faults: Faults) -> Sequence[Node]:
    """What a setting is in turn: the items of its list, or of a list by nature the lists in it; else itself."""
    if not isinstance(node.value, list):
        return (node,)
    by_nature = key == "methods" or (key in hints and fits(node.plain(), hints[key]))
    if by_nature and not (node.value and all(isinstance(item.value, list) for item in node.value)):
        return (node,)
    if not node.value:
        faults.add(node.line, f"{key} is an empty list: nothing would be tried")
        return (node,)
    seen = [repr(item.plain()) for item in node.value]
    for place, item in enumerate(node.value):
        if seen[place] in seen[:place]:
            faults.add(item.line, f"{key} {item.plain()!r} is given twice: keep one")
    return tuple(node.value)


def _hints(kind: str, node: Node) -> dict[str, Any]:
    """Types of an adapter's fields; none where its kind is unknown, which the model tells."""
    given = node.value.get("type") if isinstance(node.value, dict) else None
    name = "LORA" if kind == "lora" else str(given.value if given is not None else "").upper()
    try:
        return get_type_hints(peft_class(name))
    except KeyError:
        return {}
