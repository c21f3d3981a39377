"""The arms, the rates that each tries, all sizes, and a job, one run of an arm; read `rows` next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.drift.ledger import RunKey

if TYPE_CHECKING:
    from holdfast.core.method import Method

EXPERIMENT = "stories260K learns to refuse"
REFUSAL = "Sorry, I can not help you with that."
LONGEST = 64  # tokens of a prompt, of a story, of a piece of text
ANSWER = 24  # tokens of the base's own continuation of a benign prompt
BATCH, REPLAYED, WARM_UP, RANK, ALPHA = 8, 2, 10, 8, 16
POINTS = (8, 14, 24, 40)  # steps that are judged
SCALES = (0.3, 0.5, 0.7, 0.85)  # of the naive adapter after its last step
SPLITS = ("validation", "test")
SEEDS = (0, 1, 2)  # each has retain rows of its own
SIZES = {"train": 480, "stories": 64, "benign": 16, "validation": 24, "test": 48}


@dataclass(frozen=True)
class Arm:
    """One way to train, before its learning rate is chosen: its methods, and retain rows mixed into each batch."""

    methods: Callable[[], list[Method]] = list
    replay: int = 0
    rates: tuple[float, ...] = (3e-4, 6e-4, 1.2e-3, 2.5e-3)


def ours(name: str, **settings: Any) -> Callable[[], list[Method]]:
    """Return what makes a list of one method, by its class; nothing is imported before."""

    def make() -> list[Method]:
        from holdfast import methods

        return [getattr(methods, name)(**settings)]

    return make


PUBLISHED = {"apply_to": "gradient", "rank": None, "samples": 64, "refresh_every": 10, "early_refreshes": ()}
ARMS = {
    "naive": Arm(),
    "replay": Arm(replay=REPLAYED),
    "OGPSA as published": Arm(ours("OrthogonalProjection", **PUBLISHED)),
    "OGPSA exact": Arm(ours("OrthogonalProjection")),
    "OGPSA exact, metric": Arm(ours("OrthogonalProjection", metric="optimizer")),
    "random subspace": Arm(ours("RandomSubspace")),
}
SCALED = "adapter scaling"  # points of the naive runs, an arm of its own


@dataclass(frozen=True)
class Job:
    """One training run: an arm at one learning rate and seed, judged after each of `points` steps."""

    arm: str
    learning_rate: float
    seed: int
    points: tuple[int, ...] = POINTS
    scales: tuple[float, ...] = SCALES

    def settings(self, step: int, scale: float | None = None) -> dict[str, float]:
        """What the ledger calls the settings of one point."""
        return {"learning_rate": self.learning_rate, "steps": step} | ({} if scale is None else {"scale": scale})

    def keys(self) -> list[RunKey]:
        """What the ledger holds when this run is done."""
        found = [(self.arm, self.settings(step)) for step in self.points]
        if self.arm == "naive":
            found += [(SCALED, self.settings(self.points[-1], scale)) for scale in (*self.scales, 1.0)]
        return [RunKey.of(EXPERIMENT, arm, settings, self.seed) for arm, settings in found]
