"""What a law is fitted to: losses by amount of data, size, injected share and seed, read from the ledger.

The user names the fields, because only the user knows whether D is steps or tokens and N parameters or adapter rank.
Read next: `holdfast.analysis.fit`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from holdfast.analysis.points import BASE
from holdfast.analysis.scaling_law import Array
from holdfast.analysis.scores import find
from holdfast.drift.ledger import JSON, Entry

__all__ = ["FitError", "Points", "from_ledger"]


class FitError(ValueError):
    """Why no law can be fitted, all faults at once."""

    def __init__(self, what: str, faults: Iterable[str] = ()) -> None:
        self.faults = tuple(faults)
        super().__init__(what + "".join(f"\n  - {fault}" for fault in self.faults))


@dataclass(frozen=True)
class Points:
    """Losses and where they were measured, one value each for every run.

    Args:
        data: D, tokens or steps; above 0.
        loss: of text that should not be forgotten; above 0.
        size: N, parameters or rank; one size if left out.
        injected: p, the share of old data mixed in; 0 if left out.
        seed: of the run.
        run: which run a point is of, any number; each of its own if left out. Checkpoints of a run share its noise.
        base: L0, the loss before tuning; None if it was not measured.
        said: what a reader must know of how they were read.

    Raises:
        FitError: lists everything that is wrong.

    >>> points = Points([10, 100, 1000], [2.1, 2.2, 2.4], base=2.0)
    >>> points.decades, len(points)
    (2.0, 3)
    """

    data: Array
    loss: Array
    size: Array = ()  # type: ignore[assignment]  # sequences are taken and become arrays
    injected: Array = ()  # type: ignore[assignment]
    seed: Array = ()  # type: ignore[assignment]
    run: Array = ()  # type: ignore[assignment]
    base: float | None = None
    said: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count, faults = len(self.data), []
        left_out = {"size": np.ones(count), "injected": np.zeros(count), "seed": np.zeros(count)}
        left_out["run"] = np.arange(float(count))
        for name in ("data", "loss", *left_out):
            given = np.asarray(getattr(self, name), dtype=float)
            values = left_out[name] if given.size == 0 and name in left_out else given
            object.__setattr__(self, name, values)
            if len(values) != count:
                faults.append(f"{name} has {len(values)} values for {count} of data")
            if not np.isfinite(values).all():
                faults.append(f"{name} holds values that are not finite")
            if name in ("data", "loss", "size") and (values <= 0).any():
                faults.append(f"{name} must be above 0, as the fit is on a log scale, got {values.min():g}")
        if (self.injected < 0).any():
            faults.append(f"injected must be at least 0, got {self.injected.min():g}")
        if self.base is not None and not (math.isfinite(self.base) and self.base >= 0):
            faults.append(f"base must be a loss of at least 0, got {self.base}")
        if faults:
            raise FitError("These points cannot be fitted:", faults)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def decades(self) -> float:
        """How many powers of ten the amounts of data span."""
        return float(np.log10(self.data.max() / self.data.min()))

    def where(self, kept: np.ndarray) -> Points:
        """The points at which `kept` is true."""
        data, loss, size = self.data[kept], self.loss[kept], self.size[kept]
        injected, seed, run = self.injected[kept], self.seed[kept], self.run[kept]
        return replace(self, data=data, loss=loss, size=size, injected=injected, seed=seed, run=run)


def from_ledger(
    entries: Sequence[Entry],
    score: str,
    data: str,
    size: str | None = None,
    *,
    arm: str,
    injected: str | None = None,
    split: str = "test",
    where: Mapping[str, JSON] | None = None,
    base: float | None = None,
) -> Points:
    """The points of one arm, checkpoints of its runs included; the base's entry gives L0 unless `base` does.

    A field is looked up among an entry's settings, then its costs. Entries that were scaled after training are left
    out, since they were not tuned on less. Of a perplexity the logarithm is taken, which is a loss.

    Raises:
        FitError: lists everything that is wrong.

    >>> from holdfast.drift.ledger import Score
    >>> entries = [Entry("demo", arm, {"steps": steps}, 0, "test", {"text_nll": Score(loss)})
    ...            for arm, steps, loss in (("base", 0, 2.0), ("plain LoRA", 10, 2.1), ("plain LoRA", 100, 2.3))]
    >>> points = from_ledger(entries, "text_nll", "steps", arm="plain LoRA")
    >>> points.base, points.data.tolist(), points.loss.tolist()
    (2.0, [10.0, 100.0], [2.1, 2.3])
    """
    faults: dict[str, int] = defaultdict(int)
    known, perplexity = find(score), "perplexity" in score.split(".")[0]
    if known is not None and known.higher_is_better:
        faults[f"{score!r} is better when higher; the law is of a loss, which rises as a model forgets"] += 1
    done = {(e.key, e.split): e for e in entries if e.status == "done" and e.split == split}  # the latest of repeats
    own = [e for e in done.values() if e.arm == arm and e.settings.get("scale", 1) == 1]
    own = [e for e in own if all(e.settings.get(name) == value for name, value in (where or {}).items())]
    if not own:
        named = f" with {dict(where)}" if where else ""
        arms = sorted({f"{e.arm} ({e.split})" for e in entries})
        faults[f"no finished entry of arm {arm!r} on split {split!r}{named}; the ledger has {', '.join(arms)}"] += 1
    rows, runs = [], dict[str, int]()
    for entry in own:
        row = [_field(entry, name, faults) for name in (data, size, injected) if name is not None]
        if score not in entry.scores:
            faults[f"score {score!r} is missing; there are {', '.join(sorted(entry.scores))}"] += 1
        elif None not in row:
            value = entry.scores[score].value
            rows.append((*row, entry.seed, runs.setdefault(entry.run, len(runs)), value))
    bases = [e.scores[score].value for e in done.values() if e.arm == BASE and score in e.scores]
    if perplexity and any(value <= 0 for value in (*(e.scores[score].value for e in own if score in e.scores), *bases)):
        faults[f"{score!r} is not above 0, which a perplexity is"] += 1
    if faults:
        told = [fault if count == 1 else f"{fault} ({count} entries)" for fault, count in faults.items()]
        raise FitError(f"{arm!r} cannot be read for a fit:", told)
    columns = np.array(rows, dtype=float).T
    names = ["data", *(["size"] if size else []), *(["injected"] if injected else []), "seed", "run", "loss"]
    parts = dict(zip(names, columns, strict=True))
    if perplexity:
        parts["loss"] = np.log(parts["loss"])
    level = base if base is not None else _level(bases, perplexity)
    return Points(**parts, base=level, said=tuple(_said(own, {data, size, injected}, perplexity, score)))


def _field(entry: Entry, name: str, faults: dict[str, int]) -> float | None:
    """A number among an entry's settings or costs; counts what is wrong."""
    there = {**entry.cost, **entry.settings}
    value = there.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if name in there:
        faults[f"field {name!r} is {value!r}, not a number"] += 1
    else:
        faults[f"field {name!r} is missing; the settings and costs are {', '.join(sorted(there)) or 'none'}"] += 1
    return None


def _level(bases: Sequence[float], perplexity: bool) -> float | None:
    """L0: the mean of the base's entries."""
    return float(np.mean(np.log(bases) if perplexity else bases)) if bases else None


def _said(entries: Sequence[Entry], used: set[str | None], perplexity: bool, score: str) -> list[str]:
    """What else differs between the points, and what was done to them."""
    values: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        for name in (
            {name for other in entries for name in other.settings} - used - {"scale", "checkpoint"}
        ):  # D says it
            values[name].add(str(entry.settings.get(name)))
    told = [
        f"The points differ in {name} too ({', '.join(sorted(found))}), which the law does not know; select one value."
        for name, found in sorted(values.items())
        if len(found) > 1
    ]
    return told + [f"{score} is a perplexity: its logarithm is fitted."] * perplexity
