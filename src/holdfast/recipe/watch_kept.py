"""The trained weights of the last look within budget, in one file that is whole or not there.

    within-budget.safetensors      {name: weight}, and in its metadata: step, base, gate

A run that is resumed takes the file up again if it is of the same base and gate, and not of a step that is still to
come. Read next: `watch_callback`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..core.checkpoint import replace
from ..core.types import NamedTensors


class Kept:
    """One file of trained weights, and which step they are of.

    Attributes:
        path: the file.
        step: of the weights in it; None: nothing is kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step: int | None = None
        self._of: dict[str, str] = {}

    def begin(self, step: int, of: Mapping[str, str]) -> None:
        """Begin a run, or take up one that was stopped; a file that is not this run's past is removed.

        Args:
            step: at which the run begins; above 0 for one that is resumed.
            of: what the weights belong to: the base, the gate.
        """
        self._of, self.step = dict(of), None
        if not self.path.is_file():
            return
        from safetensors import safe_open

        with safe_open(str(self.path), "pt") as file:
            found = dict(file.metadata() or {})
        there = int(found.pop("step", -1))
        if found == self._of and 0 < there <= step:
            self.step = there
        else:
            self.path.unlink()

    def keep(self, step: int, weights: NamedTensors) -> None:
        """Write the weights in place of those that were there."""
        from safetensors.torch import save

        self.path.parent.mkdir(parents=True, exist_ok=True)
        here = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        replace(self.path, save(here, metadata={**self._of, "step": str(step)}))
        self.step = step

    def put_back(self, weights: NamedTensors) -> int | None:
        """Copy what is kept into these weights; return its step, or None if nothing is kept."""
        if self.step is None:
            return None
        from safetensors.torch import load_file

        kept = load_file(self.path)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name])
        return self.step
