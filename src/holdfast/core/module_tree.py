"""The modules of a model, found once: a pass of the base then needs no walk over them to switch modes and adapters.

What is found once goes stale when an adapter is added, a layer replaced or a weight put in another's place. So before
every use all that hangs in the tree is compared, by identity, with what hung there when it was walked. That is one
flat pass over tables, without a call into any module, and it misses nothing: a tree is its tables. Read next:
`reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from operator import methodcaller
from typing import TypeVar, cast

from torch import nn

_Found = TypeVar("_Found")


class ModuleTree:
    """What was found in a model's modules, for as long as they stay as they are.

    Args:
        root: the model.

    Attributes:
        walks: how often the tree has been walked; another number means other modules or parameters.

    >>> tree = ModuleTree(model := nn.Sequential(nn.Linear(1, 1)))
    >>> len(tree.find(all_modules)), tree.walks
    (2, 1)
    >>> model[0] = nn.Sequential(nn.Linear(1, 1))
    >>> len(tree.find(all_modules)), tree.walks
    (3, 2)
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.walks = 0
        self._walk()

    def _walk(self) -> None:
        self._tables = [table for m in self.root.modules() for table in (m._modules, m._parameters)]
        self._hung = list(self._hanging())  # held, so that no other object can have the same id
        self._ids = list(map(id, self._hung))
        self._found: dict[Callable[[nn.Module], object], object] = {}
        self.walks += 1

    def _hanging(self) -> Iterator[object]:
        return chain.from_iterable(map(methodcaller("values"), self._tables))

    def look(self) -> int:
        """Walk the tree again if anything was added to it, replaced or removed; return `walks`."""
        if list(map(id, self._hanging())) != self._ids:
            self._walk()
        return self.walks

    def find(self, search: Callable[[nn.Module], _Found]) -> _Found:
        """Return `search(root)`: searched once, and again after every change of the tree."""
        self.look()
        if search not in self._found:
            self._found[search] = search(self.root)
        return cast(_Found, self._found[search])

    def modules(self) -> list[nn.Module]:
        """Return all modules, the model first; so a tree may stand where a model is only asked for its modules."""
        return self.find(all_modules)


def all_modules(model: nn.Module) -> list[nn.Module]:
    """Return all modules of a model, itself first."""
    return list(model.modules())
