"""OGPSA: updates with no component in the span of a few gradients on retain data (arXiv 2602.07892).

    d' = d - G' (G G')^-1 G d,   rows of G: reference gradients g_1 ... g_k at the current weights

so that, to first order, no step changes any reference loss: g_i · d' = 0. The paper projects the gradient, which under
AdamW is undone in part by momentum, preconditioner and stale bases; the default here projects the *update* that the
optimizer made, which holds under any optimizer. Read next: `functional/subspace.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...core.registry import register
from ...core.types import ReferenceLoss, Setup, State, Step
from ...functional import named
from ...functional.subspace import gram, held, span
from .reference_groups import reference_groups, signal, stream_means
from .subspace_method import SubspaceMethod, block_sizes

KINDS: dict[str, tuple[ReferenceLoss, ...]] = {
    "likelihood": ("likelihood",),
    "chosen_and_rejected": ("chosen_and_rejected",),
    "preference": ("preference",),
    "both": ("likelihood", "preference"),
}
FIRST_INTERVAL, LONGEST_INTERVAL, STALE = 5, 80, 0.05  # of refresh_every="auto"


@register("orthogonal_projection")
@dataclass(frozen=True, kw_only=True)
class OrthogonalProjection(SubspaceMethod):
    """Keep updates out of the span of gradients on retain data.

    Attributes:
        rank: number of reference gradients, each the mean over its share of the retain rows, 1 to 32; None: one mean
            over each retain set, the paper's. 16 kept most in our lab.
        samples: retain rows behind one refresh, of each set; by count of sequences the paper's 200 cost 10 % of
            its steps; 64 took 2 % (measured, benchmarks).
        refresh_every: optimizer steps between refreshes; 5 kept most in our lab (the paper: 30 in SFT, 5 in DPO).
            `auto`: the interval in which a basis loses 5 % of the gradients, as measured at each refresh on the same
            rows, so it always takes the first `samples` of each set. None: the early refreshes alone.
        early_refreshes: further steps at which to refresh: a fresh LoRA has B = 0, so A has no gradient at step 0.
        rolling: instead of all reference gradients, a refresh renews one, on one retain batch, keeping this share of
            the old one (0: replaced; 0.9: a moving average). Constant cost, no stall. None: all are made anew.
        references: the loss whose gradient is taken. `likelihood`: of text or answers (of a preference pair the chosen
            one); `preference`: DPO's loss on general preferences; `both`: two constraints; `chosen_and_rejected`: the
            public code's, which also shields the likelihood of bad answers.
        beta: of the preference loss.
        repair: where a reference loss stands above where it began, demand this share of the step's length as descent
            along its gradient instead of none: answers second-order drift. 0: off, as in the paper.
        leak: add this multiple of the reference gradients, unprojected, to the first gradient after every refresh: the
            public code's accident (1 / accumulation steps under ZeRO-2), for comparisons only.

    >>> OrthogonalProjection(rank=2, refresh_every="auto").sides
    'two'
    """

    uses_retain: ClassVar[bool] = True
    rank: int | None = 16
    samples: int = 64
    refresh_every: int | Literal["auto"] | None = 5  # type: ignore[assignment]
    early_refreshes: tuple[int, ...] = (2, 5)
    rolling: float | None = None
    references: Literal["likelihood", "preference", "both", "chosen_and_rejected"] = "likelihood"
    beta: float = 0.1
    repair: float = 0.0
    leak: float = 0.0

    def __post_init__(self) -> None:
        early: object = self.early_refreshes  # recipes speak YAML, which has no tuples
        object.__setattr__(self, "early_refreshes", tuple(early) if isinstance(early, list) else early)
        super().__post_init__()

    def faults(self) -> Iterator[str]:
        yield from (fault for fault in super().faults() if not (fault.startswith("refresh") and self._auto))
        if self.rank is not None and (not isinstance(self.rank, int) or not 1 <= self.rank <= 32):
            yield f"rank must be a whole number from 1 to 32 or None, got {self.rank!r}"
        if not isinstance(self.samples, int) or self.samples < 1:
            yield f"samples must be a whole number >= 1, got {self.samples!r}"
        if not isinstance(self.early_refreshes, tuple) or not all(isinstance(n, int) for n in self.early_refreshes):
            yield f"early_refreshes must hold step numbers, got {self.early_refreshes!r}"
        if self.references not in KINDS:
            yield f"references must be one of {', '.join(KINDS)}, got {self.references!r}"
        if self.rolling is not None and not 0 <= self.rolling < 1:
            yield f"rolling is the share kept of an old reference, in [0, 1), or None, got {self.rolling}"
        if self.rolling is not None and (self._auto or self.repair or self.references == "both"):
            yield "rolling renews one gradient at a time: it goes with neither refresh_every='auto', repair nor 'both'"
        if not 0 <= self.repair < 1:
            yield f"repair is a share of the step's length, in [0, 1), got {self.repair}"
        if not self.beta > 0:
            yield f"beta must be > 0, got {self.beta}"
        if self.leak < 0 or (self.leak and self.apply_to != "gradient"):
            yield f"leak is a multiple >= 0 of a gradient and needs apply_to='gradient', got {self.leak}"

    @property
    def _auto(self) -> bool:
        return self.refresh_every == "auto"

    @property
    def uses_reference(self) -> bool:
        return "preference" in KINDS[self.references]

    def state_bytes(self, parameters: int) -> int:
        rows = (self.rank or 1) * parameters  # rank None: for each retain set
        return rows * self.bytes_each + (4 * rows if self.rolling is not None else 0)

    def due(self, state: State, step: int) -> bool:
        if step in self.early_refreshes:
            return True
        return step >= int(state["next"]) if self._auto else super().due(state, step)

    def init(self, setup: Setup) -> State:
        previous = setup.previous or {}
        if previous and self.rolling is not None:
            return self._renew_one(setup, previous)
        drawn = list(setup.draw(self.samples, self._auto).values())
        if self.rolling is not None:  # one stream: a renewed gradient takes the place of the oldest, whatever its set
            drawn = [[batch for batches in drawn for batch in batches]]
        groups, streams = reference_groups(setup, drawn, KINDS[self.references], self.rank, self.beta)
        sizes = block_sizes(setup.params, self.scope)
        products = gram(groups.rows, sizes, reduce=setup.reduce)
        means = stream_means(groups.counts, streams)
        split_half = signal(products.sum(0), groups.counts, streams)
        rows = groups.rows
        if self.rank is None or self.rank < 2 * len(means):  # one gradient for each stream: the mean of its halves
            rows, streams = means.float() @ rows, torch.arange(len(means), device=rows.device)
            products = gram(rows, sizes, reduce=setup.reduce)
        state = self.state_of(span(rows, sizes, products, setup.reduce), setup.step)
        state |= {"losses": means @ groups.losses, "split_half": split_half}
        if previous:
            state["held"] = held(self.space_of(previous, setup.params), rows, setup.reduce)
        if self.rolling is not None:
            state |= {"rows": rows, "products": products, "slot": torch.tensor(0)}
        if self.leak:
            state["leaked"] = self.leak * (means.float() @ groups.rows).sum(0)
        if self.repair:
            state |= {"start": previous.get("start", state["losses"]), "streams": streams}
        if self._auto:
            state["next"] = torch.tensor(setup.step + self._interval(previous, state, setup.step))
        return state

    def _renew_one(self, setup: Setup, state: State) -> State:
        """Give one reference gradient, the oldest, its share of a fresh one on the next retain batch."""
        slot, rows, products = int(state["slot"]) % len(state["rows"]), state["rows"], state["products"].clone()
        fresh = setup.references([setup.retain(1)], KINDS[self.references][0], self.beta)
        rows[slot] = torch.lerp(fresh.rows[0], rows[slot], float(self.rolling or 0))
        sizes = block_sizes(setup.params, self.scope)
        products[:, :, slot] = gram(rows, sizes, other=rows[slot : slot + 1], reduce=setup.reduce)[..., 0]
        products[:, slot] = products[:, :, slot]
        renewed = self.state_of(span(rows, sizes, products, setup.reduce), setup.step)
        equal = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
        return renewed | {
            "rows": rows,
            "products": products,
            "slot": torch.tensor(slot + 1),
            "losses": fresh.losses,
            "split_half": signal(products.sum(0), equal, torch.zeros_like(equal)),
        }

    def _interval(self, old: State, new: State, step: int) -> int:
        """Return in how many steps the basis will have lost `STALE` of the gradients: what it loses grows as a square.

        The controller of adaptive integrators: at most twice or half the last interval.
        """
        if not old:
            return FIRST_INTERVAL
        lasted = max(step - int(old["born"]), 1)
        factor = math.sqrt(STALE / max(1 - float(new["held"]), 1e-4))
        return min(max(round(lasted * min(max(factor, 0.5), 2.0)), 1), LONGEST_INTERVAL)

    def demanded(self, state: State, length: Tensor) -> Tensor | None:
        if not self.repair:
            return None
        wanted: Tensor = self.repair * length * (state["losses"] > state["start"])[state["streams"]]
        return wanted.expand(state["coordinates"].shape[:2])

    def transform(self, state: State, step: Step) -> Step:
        done = super().transform(state, step)
        step.log("split_half", state["split_half"])
        if "held" in state:
            step.log("held", state["held"])
        step.log("reference_loss", state["losses"].mean())
        if self.leak and int(state["born"]) == step.number:
            leaked = named.views(state["leaked"], step.params)
            done = replace(done, direction={name: d + leaked[name].to(d.dtype) for name, d in done.direction.items()})
        return done
