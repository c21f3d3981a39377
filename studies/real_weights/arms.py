"""The tasks, the arms and what each tries, all sizes, and a job, one run of an arm; read `rows` next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.drift.ledger import RunKey

if TYPE_CHECKING:
    from holdfast.core.method import Method

BATCH, REPLAYED, WARM_UP, RANK, ALPHA = 8, 2, 10, 8, 16
SCALES = (0.5, 0.65, 0.8, 1.0)  # of every adapter, after each of the judged numbers of steps
SPLITS = ("validation", "test")
POOL, POOL_TOKENS = 256, 80  # sequences of a pool, and the most tokens that the base writes of one
PLAIN, DECAY, FULL, MASKED = "plain LoRA", "update decay", "full KL", "Target-Masked KL"
REPLAY, BOTH = "self-replay", "self-replay + prompt KL"


@dataclass(frozen=True)
class Arm:
    """One way to train, before its rate and strength are chosen: its methods, and the task's rows in a batch."""

    methods: Callable[[float], list[Method]]
    batch: int = BATCH


def made(*calls: tuple[str, dict[str, Any]]) -> Callable[[float], list[Method]]:
    """What makes the methods of these names at one strength, which goes to the first; nothing is imported before."""

    def make(strength: float) -> list[Method]:
        from holdfast import methods

        return [
            getattr(methods, name)(**({"strength": strength} if place == 0 else {}) | settings)
            for place, (name, settings) in enumerate(calls)
        ]

    return make


SHARE = {"share": REPLAYED / BATCH}
ARMS = {
    PLAIN: Arm(made()),
    DECAY: Arm(made(("UpdateDecay", {}))),
    FULL: Arm(made(("FullKL", {}))),
    MASKED: Arm(made(("TargetMaskedKL", {}))),
    REPLAY: Arm(made(("SelfReplay", SHARE)), BATCH - REPLAYED),
    BOTH: Arm(made(("SelfReplay", SHARE), ("FullKL", {"strength": 1.0, "positions": "prompt"})), BATCH - REPLAYED),
}


@dataclass(frozen=True)
class Setting:
    """What an arm is trained with: the learning rate, the steps of the longest run, and the method's strength."""

    learning_rate: float
    steps: int
    strength: float | None = None


@dataclass(frozen=True)
class Task:
    """What is learnt.

    Attributes:
        title: a heading.
        files: of the training and the test rows.
        levels: of target loss, at which arms are compared.
        judged: the level that the sentences speak of.
        bar: the share of plain LoRA's rise in story loss that self-replay may have there; None: no bar was set.
        grid: by arm, what is tried.
    """

    title: str
    files: tuple[str, str]
    levels: tuple[float, ...]
    judged: float
    bar: float | None
    grid: dict[str, tuple[Setting, ...]]


TASKS = {
    "sql": Task(
        "WikiSQL: a question to a query",
        ("shift/wikisql_train_8000.jsonl", "shift/wikisql_test_1000.jsonl"),
        (2.0, 1.4, 1.1, 0.9),
        0.9,
        0.2,
        {
            PLAIN: (Setting(3e-4, 450), Setting(1e-3, 240), Setting(3e-3, 120)),
            DECAY: (Setting(3e-4, 450, 1e-2),),
            FULL: (Setting(3e-4, 450, 0.1), Setting(1e-3, 300, 0.1)),
            MASKED: (Setting(3e-4, 450, 1.0), Setting(1e-3, 300, 0.3)),
            REPLAY: (Setting(3e-3, 240, 3.0), Setting(3e-3, 240, 1.0)),
            BOTH: (Setting(3e-3, 240, 3.0),),
        },
    ),
    "gsm8k": Task(
        "GSM8K: the last sentence to the first step",
        ("capability/gsm8k_train.jsonl", "capability/gsm8k_test_first900.jsonl"),
        (3.2, 2.9, 2.7, 2.5),
        2.7,
        None,
        {
            PLAIN: (Setting(3e-4, 300), Setting(1e-3, 150)),
            DECAY: (Setting(1e-3, 150, 1e-2),),
            FULL: (Setting(1e-3, 200, 0.1),),
            MASKED: (Setting(1e-3, 200, 0.3),),
            REPLAY: (Setting(3e-3, 150, 1.0),),
            BOTH: (Setting(3e-3, 150, 1.0),),
        },
    ),
}
JUDGED_AFTER = (1 / 3, 1.0)  # shares of a run's steps


@dataclass(frozen=True)
class Job:
    """One training run: an arm on a task at one setting and seed, judged after each of `points` steps."""

    task: str
    arm: str
    setting: Setting
    seed: int
    work: Path
    scales: tuple[float, ...] = SCALES

    @property
    def name(self) -> str:
        """What it is called in the log."""
        strength = "" if self.setting.strength is None else f", strength {self.setting.strength:g}"
        return f"{self.task}, {self.arm}, rate {self.setting.learning_rate:g}{strength}, seed {self.seed}"

    @property
    def points(self) -> tuple[int, ...]:
        """The steps after which it is judged, the last included."""
        return tuple(round(share * self.setting.steps) for share in JUDGED_AFTER)

    @property
    def expected(self) -> float:
        """CPU seconds, roughly."""
        return self.setting.steps * 0.13 + len(self.points) * len(self.scales) * 1.5

    def settings(self, step: int, scale: float) -> dict[str, float]:
        """What the ledger calls the settings of one point."""
        strength = {} if self.setting.strength is None else {"strength": self.setting.strength}
        return {"learning_rate": self.setting.learning_rate, **strength, "steps": step, "scale": scale}

    def keys(self) -> list[RunKey]:
        """What the ledger holds when this run is done."""
        all_of = [self.settings(step, scale) for step in self.points for scale in self.scales]
        return [RunKey.of(self.task, self.arm, settings, self.seed) for settings in all_of]


def jobs(task: str, seeds: Sequence[int], names: Sequence[str], work: Path) -> list[Job]:
    """Every run of these arms and seeds on a task, whole seeds after each other."""
    grid = TASKS[task].grid
    return [Job(task, name, setting, seed, work) for seed in seeds for name in names for setting in grid[name]]
