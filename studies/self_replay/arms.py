"""The scenarios, the arms and what each tries, and a job, one run of an arm; read `training` next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal

from holdfast.drift.ledger import RunKey

if TYPE_CHECKING:
    from holdfast.core.method import Method


@dataclass(frozen=True)
class Scenario:
    """One of the lab's tasks.

    Attributes:
        title: a heading.
        points: steps after which a run is judged.
        seconds: CPU seconds of a plain run, roughly.
    """

    title: str
    points: tuple[int, ...]
    seconds: float


SCENARIOS = {
    "shift": Scenario("New behaviour: rotate letters, answer in a new format", (25, 50, 100), 13.0),
    "second": Scenario("New knowledge: the colours of flags, the mood of stories", (20, 40, 70), 12.0),
}
SCALES = (0.85, 0.7, 0.5)  # of every adapter after its last step, beside 1
BATCH, BESIDE, WARM_UP, RANK, ALPHA = 16, 4, 5, 8, 16  # a step has 16 sequences, of which 4 may be kept ones
KEPT, REFUSALS = 256, 64  # rows that the kept ones are drawn from; so many refusals, where they are true data
RATE = 4e-3  # of every arm but plain LoRA
PROBE, ITEMS = 24, 8  # to report: prompts of each how-to kind, and of each skill; half as many to choose by
SPLITS = ("validation", "test")
PLAIN, DECAY, MASKED, FULL = "plain LoRA", "update decay", "TMKL", "full KL"
MASKED_PROMPT, REPLAY = "TMKL + prompt KL", "self-replay"
REPLAY_PROMPT, HARD = "self-replay + prompt KL", "self-replay, hard targets"
DATA, DATA_SOFT = "true data, as data", "true data, soft targets"


def nothing(strength: float) -> list[Method]:
    """No method."""
    return []


def named(*names: str) -> Callable[[float], list[Method]]:
    """Return what makes these methods at one strength; `prompt` is the full KL on the task's prompts, at the same."""

    def make(strength: float) -> list[Method]:
        from holdfast import methods

        prompt = methods.FullKL(positions="prompt", strength=strength)
        return [prompt if name == "prompt" else getattr(methods, name)(strength=strength) for name in names]

    return make


def replay_and_prompt(strength: float) -> list[Method]:
    """Self-replay at this strength, and the full KL on the task's prompts at 1."""
    from holdfast import methods

    return [methods.SelfReplay(strength=strength), methods.FullKL(positions="prompt", strength=1.0)]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        methods: by strength.
        tries: pairs of a learning rate and a strength.
        beside: what joins the task's sequences in every step, in the place of a quarter of them.
        as_data: it does so as ordinary data, with a cross-entropy that is `strength` times as strong.
        cost: against plain LoRA's.
    """

    methods: Callable[[float], list[Method]]
    tries: tuple[tuple[float, float], ...]
    beside: Literal["", "pool", "data"] = ""
    as_data: bool = False
    cost: float = 1.0

    @property
    def task_rows(self) -> int:
        """Task sequences of a step."""
        return BATCH - BESIDE if self.beside else BATCH


def at(*strengths: float) -> tuple[tuple[float, float], ...]:
    """These strengths at the common rate."""
    return tuple((RATE, strength) for strength in strengths)


ARMS: dict[str, Arm] = {
    PLAIN: Arm(nothing, ((1e-3, 0.0), (2e-3, 0.0), (4e-3, 0.0))),
    DECAY: Arm(named("UpdateDecay"), at(1e-3, 3e-3, 1e-2)),
    FULL: Arm(named("FullKL"), at(0.1, 0.3), cost=1.3),
    MASKED: Arm(named("TargetMaskedKL"), at(0.1, 0.3), cost=1.3),
    MASKED_PROMPT: Arm(named("TargetMaskedKL", "prompt"), at(0.1, 0.3), cost=1.4),
    REPLAY: Arm(named("SelfReplay"), (*at(0.3, 1.0, 3.0), (2e-3, 1.0)), "pool", cost=1.3),
    REPLAY_PROMPT: Arm(replay_and_prompt, at(0.3, 1.0), "pool", cost=1.5),
    HARD: Arm(nothing, at(0.3, 1.0), "pool", as_data=True),
    DATA: Arm(nothing, at(0.3, 1.0), "data", as_data=True),
    DATA_SOFT: Arm(named("SelfReplay"), at(0.3, 1.0), "data", cost=1.3),
}


@dataclass(frozen=True)
class Job:
    """One training run: an arm at one learning rate, strength and seed, judged after each of `points` steps."""

    scenario: str
    arm: str
    learning_rate: float
    strength: float
    seed: int
    points: tuple[int, ...]
    items: int = ITEMS
    probe: int = PROBE

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

    def readings(self) -> list[dict[str, float]]:
        """The settings of every point that is judged."""
        scaled = [self.settings(self.points[-1], scale=scale) for scale in SCALES]
        return [*(self.settings(step) for step in self.points), *scaled]

    def keys(self) -> list[RunKey]:
        """What the ledger holds when this run is done."""
        return [RunKey.of(self.scenario, self.arm, settings, self.seed) for settings in self.readings()]


def jobs(scenarios: Sequence[str], seeds: Sequence[int], arms: Sequence[str]) -> list[Job]:
    """Every run of these scenarios, seeds and arms."""
    return [
        Job(scenario, name, rate, strength, seed, SCENARIOS[scenario].points)
        for scenario, name, seed in product(scenarios, arms, seeds)
        for rate, strength in ARMS[name].tries
    ]
