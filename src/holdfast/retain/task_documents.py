"""Whether the base says of a packed document what it says of it alone: tried, and once for every way it is called.

Whether a model minds where position ids begin anew depends on its attention and on how it is called: in transformers
with a mask it may not, and FlashAttention does so in batches of one row alone. So each way is tried on the first row
that comes so: the base runs on the beginning of a document alone, where neighbours would show most. Read next:
`task_keys`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.reference import Reference
from ..core.tap import Call, Tap
from .task_keys import PASSED, Sequences

__all__ = ["Documents"]

FIRST = 16  # tokens of a document that are compared: later ones see more of their own, and less of their neighbours
FINE, COARSE = 1e-3, 5e-2  # how far apart, relative to the base alone: in 32 bits or more, and in 16
Way = tuple[tuple[str, ...], bool, bool]


class Documents:
    """What was found out about a base.

    Args:
        tap: on the student's model.
        reference: the frozen base.
        tell: hears where documents see each other.
    """

    def __init__(self, tap: Tap, reference: Reference, tell: Callable[[str], None]) -> None:
        self._tap, self._reference, self._tell = tap, reference, tell
        self._found: dict[Way, bool] = {}

    def apart(self, seen: Sequences, call: Call, run: Callable[[], Tensor]) -> bool:
        """Return whether each document of a batch can be known by itself.

        Args:
            seen: what the base sees of the batch.
            call: of the student's backbone.
            run: runs the base on the batch, [B, T, H].
        """
        packed = seen.packed_row()
        if packed is None:
            return True
        if seen.beyond:
            return False  # alone, a document would not be given the frequencies that it is given here
        if (way := way_of(seen, call)) not in self._found:
            self._found[way] = self._alike(seen, call, run, *packed)
            if not self._found[way]:
                self._tell(
                    "documents in one row see each other in this model (its attention does not mind where position ids "
                    "begin anew, or was given a mask), so whole rows are kept: pack them once, not in every epoch"
                )
        return self._found[way]

    def _alike(self, seen: Sequences, call: Call, run: Callable[[], Tensor], row: int, start: int, end: int) -> bool:
        end = min(end, start + FIRST)
        among = run()[row, start:end].float()
        here = {"input_ids": seen.ids, "position_ids": seen.positions}
        inputs = self._tap.inputs({name: t[row : row + 1, start:end].to(among.device) for name, t in here.items()})
        alone = self._reference.hidden(self._tap, Call(torch.empty(0), (), inputs, call.autocast))[0]
        coarse = call.autocast[2] or alone.dtype in (torch.float16, torch.bfloat16)
        gap = (among - alone.float()).norm() / alone.float().norm()
        return bool(gap <= (COARSE if coarse else FINE))


def way_of(seen: Sequences, call: Call) -> Way:
    """Return what of a call may decide how a model tells documents apart: arguments, several rows, padding."""
    given = sorted(name for name in PASSED if isinstance(call.kwargs.get(name), Tensor))
    width = seen.ids.shape[1]
    return tuple(given), len(seen.ids) > 1, any(length < width for length in seen.lengths)
