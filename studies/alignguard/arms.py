"""The scenarios, the arms and what each tries, and a job, one run of an arm; read `training` next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.drift.ledger import RunKey

if TYPE_CHECKING:
    from holdfast.core.method import Method


@dataclass(frozen=True)
class Scenario:
    """What is learnt, and what must stay.

    Attributes:
        title: a heading.
        points: steps that are judged.
        rates: learning rates of the arm without protection.
        rate: of all others.
        alignment: the retain sets that show what the paper calls alignment.
        kept: all retain sets that show what must stay.
        rows: of each retain set that a Fisher is estimated on.
        seconds: CPU seconds of a run, roughly.
    """

    title: str
    points: tuple[int, ...] = (36,)
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    rate: float = 4e-3
    alignment: tuple[str, ...] = ("alignment",)
    kept: tuple[str, ...] = ("alignment", "skills", "text")
    rows: int = 96
    seconds: float = 4.5


SCENARIOS = {
    "shift": Scenario("New behaviour: rotate letters, answer in a new format"),
    "second": Scenario("New knowledge: the colours of flags, the mood of stories", seconds=6.0),
    "stories": Scenario(
        "Real weights: stories260K learns SQL",
        points=(80,),
        rates=(3e-4, 1e-3, 3e-3),
        rate=3e-3,
        alignment=("stories",),
        kept=("stories",),
        seconds=10.0,
    ),
}
LAB = ("shift", "second")
SCALES = (0.85, 0.7)  # of every adapter after its last step, beside 1
THRESHOLDS = (0.6, 0.8)  # of SafeLoRA: at the public code's 0.35 it picks no layer here
BATCH, WARM_UP, RANK, ALPHA = 8, 5, 8, 16
PROBE, ITEMS = 24, 6  # to report: prompts of each how-to kind, and of each skill; half as many to choose by
SPLITS = ("validation", "test")
PLAIN, DECAY, PAPER, FULL, PROJECTED = "plain LoRA", "update decay", "paper form", "full form", "SafeLoRA"
TERMS = {"alignment": 0.1, "stability": 1e-3, "overlap": 0.1, "separation": 1.0}  # as in the preset of the paper's form
Make = Callable[[Scenario, float], "list[Method]"]


def ours(name: str, sets: str = "", **settings: Any) -> Make:
    """Return what makes a list of one method, by its class; its data are the scenario's `alignment` or `kept` sets."""

    def make(scenario: Scenario, strength: float) -> list[Method]:
        from holdfast import methods

        data = {"data": getattr(scenario, sets), "rows": scenario.rows} if sets else {}
        return [getattr(methods, name)(strength=strength, **data, **settings)]

    return make


def terms(chosen: Sequence[str] = tuple(TERMS), data: tuple[str, ...] = (), **settings: Any) -> Make:
    """Return what makes these terms of the paper's form; a strength multiplies those of all terms."""

    def make(scenario: Scenario, strength: float) -> list[Method]:
        from holdfast import methods

        shared = {"data": data or scenario.alignment, "rows": scenario.rows, "top": 0.9, **settings}
        build = {
            "alignment": methods.FisherAlignment,
            "stability": methods.TaskStability,
            "overlap": methods.RiemannianOverlap,
            "separation": methods.GeodesicSeparation,
        }
        return [build[name](strength=strength * TERMS[name], **shared) for name in chosen]

    return make


def nothing(scenario: Scenario, strength: float) -> list[Method]:
    """No method."""
    return []


@dataclass(frozen=True)
class Arm:
    """One way to train: its methods, the strengths that it tries, where it runs, and its cost against plain LoRA's."""

    methods: Make
    strengths: tuple[float, ...] = (1.0,)
    scenarios: tuple[str, ...] = LAB
    cost: float = 1.0


EVERYWHERE = (*LAB, "stories")
ARMS: dict[str, Arm] = {
    PLAIN: Arm(nothing, scenarios=EVERYWHERE),
    DECAY: Arm(ours("UpdateDecay"), (1e-3, 3e-3, 1e-2), EVERYWHERE),
    "L2-SP": Arm(ours("L2SP"), (1e-2, 1e-1)),
    "EWC": Arm(ours("EWC", "kept"), (2e-3, 2e-2), EVERYWHERE, cost=1.4),
    "O-LoRA": Arm(ours("OrthogonalLoRA", "alignment"), (1e-2, 1e-1), cost=1.2),
    FULL: Arm(ours("FisherAlignment", "kept"), (1e-3, 3e-3, 1e-2), EVERYWHERE, cost=1.7),
    f"{FULL}, alignment only": Arm(ours("FisherAlignment", "alignment"), (1e-2, 1e-1), cost=1.3),
    f"{FULL}, rotated": Arm(ours("FisherAlignment", "kept", rotated=True), (3e-3, 1e-2), EVERYWHERE, cost=1.7),
    PAPER: Arm(terms(), (1.0, 3.0), EVERYWHERE, cost=2.4),
    f"{PAPER}, text Fisher": Arm(terms(data=("text",)), (1.0, 3.0), cost=2.4),
    f"{PAPER}, rotated": Arm(terms(rotated=True), (1.0, 3.0), cost=2.4),
    **{f"without {left}": Arm(terms([t for t in TERMS if t != left]), (1.0, 3.0), cost=2.2) for left in TERMS},
    **{f"{name} alone": Arm(terms([name]), (1.0, 10.0), cost=1.4) for name in TERMS},
}


@dataclass(frozen=True)
class Job:
    """One training run: an arm at one learning rate, strength and seed, judged after each of `points` steps.

    Attributes:
        work: the folder with the rows and the model of the scenario `stories`, and with Fishers that runs share.
    """

    scenario: str
    arm: str
    learning_rate: float
    strength: float
    seed: int
    points: tuple[int, ...]
    items: int = ITEMS
    probe: int = PROBE
    work: Path = Path()

    @property
    def name(self) -> str:
        """What it is called while it runs."""
        return f"{self.scenario}, {self.arm}, rate {self.learning_rate:g}, strength {self.strength:g}, seed {self.seed}"

    @property
    def expected(self) -> float:
        """CPU seconds that it may take."""
        return SCENARIOS[self.scenario].seconds * ARMS[self.arm].cost

    def settings(self, step: int, **after: float) -> dict[str, float]:
        """What the ledger calls the settings of one point; `after` is what was done to the adapter after training."""
        strength = {} if self.arm == PLAIN else {"strength": self.strength}
        return {"learning_rate": self.learning_rate, **strength, "steps": step, **after}

    def readings(self) -> list[tuple[str, dict[str, float]]]:
        """Every point that is judged: the arm that it counts for, and its settings."""
        last = self.points[-1]
        found = [(self.arm, self.settings(step)) for step in self.points]
        found += [(self.arm, self.settings(last, scale=scale)) for scale in SCALES]
        if self.arm == PLAIN and self.scenario in LAB:
            found += [(PROJECTED, self.settings(last, threshold=threshold)) for threshold in THRESHOLDS]
        return found

    def keys(self) -> list[RunKey]:
        """What the ledger holds when this run is done."""
        return [RunKey.of(self.scenario, arm, settings, self.seed) for arm, settings in self.readings()]


def jobs(scenarios: Sequence[str], seeds: Sequence[int], arms: Sequence[str], work: Path) -> list[Job]:
    """Every run of these scenarios, seeds and arms."""
    found = []
    for scenario, name, seed in product(scenarios, arms, seeds):
        own, arm = SCENARIOS[scenario], ARMS[name]
        rates = own.rates if name == PLAIN else (own.rate,)
        if scenario in arm.scenarios:
            found += [Job(scenario, name, *each, seed, own.points, work=work) for each in product(rates, arm.strengths)]
    return found
