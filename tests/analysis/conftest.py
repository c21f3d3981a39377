"""Synthetic experiments: arms whose true trade-off is known, measured on noisy items by seeds that differ."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from holdfast.drift.ledger import Entry, Score

TIME = "2026-11-22T10:00:00+00:00"
ARMS = {"plain LoRA": 0.55, "full KL": 0.42, "TMKL": 0.40, "TMKL + prompt": 0.12}
"""How much of the old skills each arm forgets when it has learned the whole task."""


def _share(random: np.random.Generator, expected: float, difficulty: np.ndarray) -> Score:
    """A share of right answers; `difficulty` belongs to the items and is met by every arm and seed alike."""
    odds = np.log(np.clip(expected, 0.01, 0.99) / (1 - np.clip(expected, 0.01, 0.99)))
    right = random.random(len(difficulty)) < 1 / (1 + np.exp(-(1.3 * odds + difficulty)))
    return Score(float(right.mean()), items=tuple(right.astype(float)))


def experiment(
    random: np.random.Generator,
    arms: Mapping[str, float] = ARMS,
    seeds: Sequence[int] = (0, 1, 2),
    strengths: Sequence[float] = (0.5, 1.0),
    scales: Sequence[float] = (0.4, 0.6, 0.8, 1.0),
    items: int = 60,
    spread: float = 0.15,
) -> list[Entry]:
    """Entries like those of the demo. `spread` is the standard deviation, on a log scale, of what a seed forgets."""
    difficulty = {
        (split, score): random.normal(0, 1.0, items)
        for split in ("validation", "test")
        for score in ("adaptation", "skills", "refusal")
    }

    def entry(arm: str, settings: dict, seed: int, split: str, learned: float, lost: float, cost: dict) -> Entry:
        return Entry(
            "demo", arm, settings, seed, split,
            {
                "adaptation": _share(random, learned, difficulty[split, "adaptation"]),
                "skills": _share(random, 0.9 * (1 - lost), difficulty[split, "skills"]),
                "refusal": _share(random, 0.97 * (1 - lost**2), difficulty[split, "refusal"]),
                "story_perplexity": Score(8 * (1 + 1.5 * lost) + random.normal(0, 0.05), n=40, standard_error=0.05),
            },
            cost=cost, time=TIME, environment={"python": "3.11", "cores": 2, "torch": "2.13", "commit": "abc123"},
        )  # fmt: skip

    found = [entry("base", {}, 0, split, 0.02, 0.0, {"evaluate_seconds": 2.0}) for split in ("validation", "test")]
    for arm, forgets in arms.items():
        for seed in seeds:
            luck = random.normal(0, 1, 2)
            for strength in strengths:
                seconds = {"train_seconds": 20 * (1 + 0.4 * (arm != "plain LoRA")) + random.normal(0, 0.5)}
                for scale in scales:
                    learned = 1 / (1 + np.exp(-7 * (scale * (1.2 - 0.15 * strength) - 0.5 + 0.03 * luck[0])))
                    lost = forgets * (1.15 - 0.3 * strength) * scale**1.5 * np.exp(spread * luck[1])
                    for split in ("validation", "test"):
                        settings = {"learning_rate": 4e-3, "strength": strength, "scale": scale}
                        found.append(
                            entry(arm, settings, seed, split, learned, lost, seconds | {"evaluate_seconds": 2.0})
                        )
    return found


@pytest.fixture(scope="session")
def demo() -> list[Entry]:
    """One synthetic experiment with four arms and three seeds."""
    return experiment(np.random.default_rng(0))


@pytest.fixture(scope="session")
def simulate():
    """The generator itself, for tests that need many experiments."""
    return experiment
