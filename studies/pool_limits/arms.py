"""The scenarios, the arms and what each tries, and a job, one run of an arm; read `pools` next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.drift.ledger import RunKey

if TYPE_CHECKING:
    from holdfast.core.method import Method


@dataclass(frozen=True)
class Scenario:
    """One way to tune, and how far.

    Attributes:
        title: a heading.
        task: of the lab.
        rates: learning rates of the arm without protection.
        rate: of all others; where there are but two arms, the other one tries `rates` as well.
        points: steps after which a run is judged.
        levels: of task loss, at which arms are compared; the last one is judged.
        rank: of LoRA, which has twice as much alpha; 0: all weights are trained.
        seconds: CPU seconds of a plain run, roughly.
    """

    title: str
    task: str = "shift"
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    rate: float = 4e-3
    points: tuple[int, ...] = (30, 60, 120)
    levels: tuple[float, ...] = (0.2, 0.28)
    rank: int = 8
    seconds: float = 18.0


SCENARIOS = {
    "shift": Scenario("What the pool holds"),
    "long": Scenario(
        "Three times as many steps", rates=(2e-3,), points=(60, 120, 360), levels=(0.2, 0.15), seconds=36.0
    ),
    "rank": Scenario("Rank 64", rates=(5e-4, 1e-3), rate=2e-3, rank=64, seconds=20.0),
    "dense": Scenario("All weights are trained, no LoRA", rates=(2e-4, 5e-4), rate=1e-3, rank=0, seconds=18.0),
    "second": Scenario(
        "New knowledge", task="second", rates=(2e-3, 4e-3), points=(20, 40, 80), levels=(0.5, 0.4), seconds=20.0
    ),
}
SCALES = (1.0, 0.85)  # of what was learnt, after the last two points; after the first only as it is
BATCH, BESIDE, WARM_UP = 16, 4, 5  # a step has 16 sequences, of which 4 are the pool's where there is one
PROBE, ITEMS = 32, 8  # to report: prompts of each how-to kind, and of each skill; half as many to choose by
SPLITS = ("validation", "test")
PLAIN, WHOLE, TEXT, CHAT = "plain LoRA", "whole pool", "only plain text", "only chat"
SLOWER = "whole pool, lower rates"
NO_REFUSALS, NO_FACTS, NO_LISTS = "no refusals", "no facts", "no lists"
NOT_EVEN_SOFTLY = "no refusals, not even softly"
NOISE, PROMPT_KL, DECAY, ROWS = "text + random tokens", "text + prompt KL", "text + update decay", "text + 8 prompts"
TINY, SMALL, SHORT, OTHER = "8 sequences", "32 sequences", "short sequences", "another pool seed"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        what: in words, for the page.
        pool: its name; none: nothing is replayed.
        extra: a method beside self-replay: `prompt` (full KL on the task's prompts) or `decay`.
        strengths: of the extra method.
        rates: learning rates, where they are not the scenario's.
        everywhere: whether it runs in every scenario, or in `shift` alone.
        cost: against plain LoRA's.
    """

    what: str
    pool: str = ""
    extra: str = ""
    strengths: tuple[float, ...] = (1.0,)
    rates: tuple[float, ...] = ()
    everywhere: bool = False
    cost: float = 1.3

    def methods(self, strength: float) -> list[Method]:
        """The methods of a run."""
        from holdfast import methods

        found: list[Method] = [methods.SelfReplay()] if self.pool else []
        if self.extra == "prompt":
            found.append(methods.FullKL(positions="prompt", strength=strength))
        if self.extra == "decay":
            found.append(methods.UpdateDecay(strength=strength))
        return found


ARMS: dict[str, Arm] = {
    PLAIN: Arm("no pool", everywhere=True, cost=1.0),
    WHOLE: Arm("256 as `make` samples them: text, chat, random tokens in the chat format", WHOLE, everywhere=True),
    SLOWER: Arm("the same at the lower learning rates of plain LoRA", WHOLE, rates=(1e-3, 2e-3)),
    NO_REFUSALS: Arm("no forbidden subject and no refusal, not even by accident", NO_REFUSALS),
    NOT_EVEN_SOFTLY: Arm("the same, and nowhere does the base think of refusing (2 % or more)", NOT_EVEN_SOFTLY),
    NO_FACTS: Arm("no name and no word of the gazetteer", NO_FACTS),
    NO_LISTS: Arm("no copying, reversing, sorting or naming of ends, no two letters in a row", NO_LISTS),
    TEXT: Arm("stories, no chat format at all", TEXT),
    CHAT: Arm("chat and random tokens, no story", CHAT),
    NOISE: Arm("half stories, half random tokens in the chat format: no question and no whole answer", NOISE),
    PROMPT_KL: Arm("stories, and full KL on the task's own prompts", TEXT, "prompt", cost=1.6),
    DECAY: Arm("stories, and a penalty on the size of the update", TEXT, "decay", (1e-3, 3e-3)),
    ROWS: Arm("24 stories and 8 rows that a user might give, one of each common skill, none refused", ROWS),
    TINY: Arm("the whole pool of 8", TINY),
    SMALL: Arm("the whole pool of 32", SMALL),
    SHORT: Arm("256 sequences with 8 sampled tokens at most", SHORT),
    OTHER: Arm("256 others of the same kinds", OTHER),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One training run: an arm at one learning rate, strength and seed, judged after each of `points` steps.

    Attributes:
        work: the folder with the pools.
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

    def settings(self, step: int, scale: float) -> dict[str, float]:
        """What the ledger calls the settings of one point."""
        strength = {"strength": self.strength} if ARMS[self.arm].extra else {}
        return {"learning_rate": self.learning_rate, **strength, "steps": step, "scale": scale}

    def readings(self) -> list[dict[str, float]]:
        """The settings of every point that is judged."""
        after = {step: SCALES if step in self.points[-2:] else (1.0,) for step in self.points}
        return [self.settings(step, scale) for step, scales in after.items() for scale in scales]

    def keys(self) -> list[RunKey]:
        """What the ledger holds when this run is done."""
        return [RunKey.of(self.scenario, self.arm, settings, self.seed) for settings in self.readings()]


def rates_of(scenario: str, name: str) -> tuple[float, ...]:
    """The learning rates of an arm: one in `shift`, where every arm but plain LoRA has the same; elsewhere a sweep."""
    own, arm = SCENARIOS[scenario], ARMS[name]
    if name == PLAIN:
        return own.rates
    return arm.rates or tuple(dict.fromkeys((own.rate, *(own.rates if scenario != "shift" else ()))))


def jobs(scenarios: Sequence[str], seeds: Sequence[int], arms: Sequence[str], work: Path) -> list[Job]:
    """Every run of these scenarios, seeds and arms."""
    found = []
    for scenario in scenarios:
        own = SCENARIOS[scenario]
        for name in (name for name in arms if scenario == "shift" or ARMS[name].everywhere):
            rates = rates_of(scenario, name)
            tries = [(rate, strength) for rate in rates for strength in ARMS[name].strengths]
            found += [Job(scenario, name, *each, seed, own.points, work=work) for each in tries for seed in seeds]
    return found
