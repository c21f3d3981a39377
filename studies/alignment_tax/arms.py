"""The arms, the pipelines and the rates that each tries, and a job, one run of an arm; read `training` next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.drift.ledger import RunKey

if TYPE_CHECKING:
    from holdfast.core.method import Method

STAGES: dict[str, tuple[tuple[str, int], ...]] = {  # what is trained, and for how many steps
    "sft": (("sft", 60),),
    "dpo": (("dpo", 60),),
    "sft_dpo": (("sft", 40), ("dpo", 20)),
    "sft_large": (("sft", 60),),
}
POINTS = {  # steps that are judged
    "sft": (20, 30, 45, 60),
    "dpo": (20, 30, 45, 60),
    "sft_dpo": (30, 40, 50, 60),
    "sft_large": (20, 30, 45, 60),
}
RATES = (7e-4, 1e-3, 2e-3, 3e-3)  # of the arms that the verdict rests on; others leave out one that did not serve
LOWER, HIGHER = RATES[:-1], RATES[1:]  # variants of projections, and of replay
RATES_OF = {
    "dpo": LOWER,
    "sft_dpo": (1e-3, 1.5e-3, 2e-3),
    "sft_large": LOWER,
}  # where there is more than SFT, the same for all arms
DPO_RATE = 0.3  # the learning rate of DPO after SFT, as a share of that of SFT
SCALES = (0.3, 0.5, 0.7, 0.85, 1.0)  # of the naive adapter after its last step
BATCH, WARM_UP, BETA, RANK = 16, 5, 0.2, 8
BATCH_OF = {"sft_large": 128}  # the published recipe's: a refresh is then a small part of the steps between two
CHAT_ROWS, STORY_ROWS = 64, 16  # of the retain data
PROBE, ITEMS = 48, 24  # test prompts for each of refusal, over-refusal, benign answers and danger; for each other skill
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Arm:
    """One way to train, before its learning rate is chosen.

    Attributes:
        methods: makes its list of methods.
        rows: which retain rows it has: "all", "no look-alikes" (no harmless how-to questions) or "few" (8 rows).
        replay: how many retain rows are mixed into each batch.
        apart: instead, each retain set has its share of them in a loss of its own, which is added.
        rates: the learning rates that it tries.
        cost: CPU seconds of a run of SFT, roughly: the slow ones start first, and the estimate needs it.
        pipelines: where it runs.
        chosen: the weight, in DPO, of the cross-entropy of the chosen answers beside the sigmoid loss.
    """

    methods: Callable[[], list[Method]] = list
    rows: str = "all"
    replay: int = 0
    apart: bool = False
    rates: tuple[float, ...] = RATES
    cost: float = 10.0
    pipelines: tuple[str, ...] = ("sft",)
    chosen: float = 1.0


def ours(name: str, **settings: Any) -> Callable[[], list[Method]]:
    """Return what makes a list of one method, by its class; nothing is imported before."""

    def make() -> list[Method]:
        from holdfast import methods

        return [getattr(methods, name)(**settings)]

    return make


def projection(**settings: Any) -> Callable[[], list[Method]]:
    """The projection of the update, rank 16, refreshed every 5 steps unless said otherwise."""
    return ours("OrthogonalProjection", **{"rank": 16, "refresh_every": 5, **settings})


def published(**settings: Any) -> Callable[[], list[Method]]:
    """OGPSA as its paper has it: the gradient, one mean for each retain set, all weights at once."""
    fixed = {"apply_to": "gradient", "rank": None, "refresh_every": 10, "early_refreshes": ()}
    return ours("OrthogonalProjection", **{**fixed, **settings})


EVERYWHERE, LARGE = ("sft", "dpo", "sft_dpo"), ("sft_large",)
ARMS: dict[str, Arm] = {
    "naive": Arm(cost=14, pipelines=(*EVERYWHERE, *LARGE)),
    "naive, sigmoid loss alone": Arm(rates=LOWER, chosen=0.0, pipelines=("dpo",)),
    "replay": Arm(replay=4, cost=11, pipelines=EVERYWHERE),
    "replay, equal cost": Arm(replay=36, cost=23, rates=HIGHER),
    "replay, own loss": Arm(replay=8, apart=True, cost=13, rates=LOWER),
    "replay, 16 rows": Arm(replay=16, cost=14, pipelines=LARGE),
    "A-GEM": Arm(ours("AGEM", retain_batches=4), cost=19, rates=LOWER),
    "PCGrad": Arm(ours("PCGrad"), cost=16, rates=LOWER),
    "as published": Arm(published(), cost=16, rates=LOWER, pipelines=EVERYWHERE),
    "as published, refresh 30": Arm(published(refresh_every=30), cost=12, rates=LOWER),
    "as published, one-sided": Arm(published(sides="one"), cost=16, rates=LOWER),
    "official code": Arm(published(scope="tensor"), cost=16, rates=LOWER, pipelines=EVERYWHERE),
    "official code, leaking": Arm(published(scope="tensor", leak=1.0), cost=16, rates=LOWER),
    "update": Arm(projection(), cost=23, pipelines=(*EVERYWHERE, *LARGE)),
    "update, refresh 10": Arm(projection(refresh_every=10), cost=17, rates=LOWER),
    "update, refresh 30": Arm(projection(refresh_every=30), cost=13, rates=LOWER),
    "update, refresh auto": Arm(projection(refresh_every="auto"), cost=17, rates=LOWER, pipelines=("sft", *LARGE)),
    "update, rank 32": Arm(projection(rank=32), cost=24, rates=LOWER),
    "update, rank 32, refresh auto": Arm(
        projection(rank=32, refresh_every="auto"), cost=19, rates=LOWER, pipelines=LARGE
    ),
    "update, refresh rolling": Arm(projection(refresh_every=1, rolling=0.0), cost=16, rates=LOWER),
    "update, metric": Arm(projection(metric="optimizer"), cost=25, rates=LOWER, pipelines=EVERYWHERE),
    "update, one-sided": Arm(projection(sides="one"), cost=24, rates=LOWER),
    "update, per tensor": Arm(projection(scope="tensor", rank=2), cost=21, rates=LOWER),
    "random subspace": Arm(
        ours("RandomSubspace", rank=16, refresh_every=5), cost=11, rates=LOWER, pipelines=EVERYWHERE
    ),
    "update, no look-alikes": Arm(projection(), rows="no look-alikes", cost=23, rates=LOWER),
    "update, 8 rows": Arm(projection(rank=8), rows="few", cost=13, rates=LOWER),
    "replay, 8 rows": Arm(rows="few", replay=4, cost=11, rates=HIGHER),
    "update, one-sided, + replay": Arm(projection(sides="one"), replay=4, cost=25, rates=LOWER),
}
SCALED = "adapter scaling"  # points of the naive runs, an arm of its own


@dataclass(frozen=True)
class Job:
    """One training run: an arm at one learning rate and seed, judged after each of `points` steps."""

    pipeline: str
    arm: str
    learning_rate: float
    seed: int
    points: tuple[int, ...]
    items: int = ITEMS
    probe: int = PROBE

    def keys(self) -> list[RunKey]:
        """What the ledger holds when this run is done."""
        found = [(self.arm, self.settings(step)) for step in self.points]
        found += [(SCALED, self.settings(self.points[-1], scale)) for scale in self.scales]
        return [RunKey.of(self.pipeline, arm, settings, self.seed) for arm, settings in found]

    @property
    def name(self) -> str:
        """What it is called while it runs."""
        return f"{self.pipeline}, {self.arm}, rate {self.learning_rate:g}, seed {self.seed}"

    @property
    def scales(self) -> tuple[float, ...]:
        """How strong, after its last step, the adapter of this run is judged as well."""
        return SCALES if self.arm == "naive" else ()

    @property
    def expected(self) -> float:
        """CPU seconds that it may take, pairs taking longer than refusals."""
        return ARMS[self.arm].cost + {"sft": 0, "dpo": 5, "sft_dpo": 3, "sft_large": 30}[self.pipeline]

    def settings(self, step: int, scale: float | None = None) -> dict[str, float]:
        """What the ledger calls the settings of one point."""
        scaled = {} if scale is None else {"scale": scale}
        return {"learning_rate": self.learning_rate, "steps": step, **scaled}
