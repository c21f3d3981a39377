"""The comparisons, each a recipe in recipes/results/, and how their scores are read; read `columns` next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from holdfast.analysis.scores import ScoreKind

ROOT = Path(__file__).resolve().parents[2]
RECIPES, RESULTS = ROOT / "recipes" / "results", ROOT / "docs" / "results"
PLAIN, DECAY, FULL, MASKED, REPLAY = "plain LoRA", "update decay", "full KL", "TMKL", "self-replay"
FRACTIONS = (0.75, 0.9, 0.95)  # of the way from the base to the best of plain LoRA: where arms are compared
LAB = ("refusals_loss", "look_alikes_loss", "skills_loss", "rare_skill_loss", "stories_loss")
TINY = ("stories_loss", "oz_loss", "wikitext_loss")
KINDS = {
    "new_task_loss": ScoreKind("Task loss", False, ".3f"),
    "refusals_loss": ScoreKind("Refusal loss", False, ".3f", ratio=True),
    "look_alikes_loss": ScoreKind("Look-alikes loss", False, ".3f", ratio=True),
    "skills_loss": ScoreKind("Skills loss", False, ".3f", ratio=True),
    "rare_skill_loss": ScoreKind("Rare skill loss", False, ".3f", ratio=True),
    "stories_loss": ScoreKind("Story loss", False, ".3f"),
    "oz_loss": ScoreKind("Loss on Oz", False, ".3f"),
    "wikitext_loss": ScoreKind("Loss on WikiText", False, ".3f"),
}
"""Losses of short answers span decades from seed to seed: they are compared by their ratio."""


@dataclass(frozen=True)
class Study:
    """One recipe, and what the pages make of it.

    Attributes:
        title: what is learnt.
        page: whose it is; its folder in docs/results/ has the ledger.
        learn: where arms are matched.
        keep: by what they are compared.
        others: by name of another recipe that shares model, data, steps and rows, which of its arms belong here too;
            none named: all.
    """

    title: str
    page: str
    learn: str = "new_task_loss"
    keep: tuple[str, ...] = LAB
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


STUDIES: Mapping[str, Study] = {
    "tmkl": Study("lab, new behaviour", "tmkl"),
    "default_word_problems": Study("stories260K, MAWPS", "default", keep=TINY),
    "default_safety": Study(
        "lab, learning to refuse", "default", "refusals_loss", tuple(name for name in LAB if name != "refusals_loss")
    ),
    "combinations_shift": Study(
        "lab, new behaviour", "combinations", others={"tmkl": (PLAIN, DECAY, MASKED, FULL, "TMKL, prompts too")}
    ),
    "default_plays": Study("stories260K, Shakespeare", "default", keep=TINY),
    "combinations_second": Study("lab, new knowledge", "combinations"),
    "tmkl_adapters": Study("lab, new behaviour", "tmkl", others={"tmkl": ()}),
    "sampled_reference": Study("lab, new behaviour", "sampled"),
    "law": Study("lab, over steps and ranks", "law", keep=("stories_loss", "skills_loss", "refusals_loss")),
}
"""In the order in which they are run."""


def recipe(name: str) -> Path:
    """Where the recipe of a comparison lies."""
    return RECIPES / f"{name}.yaml"


def arms_of(name: str) -> list[str]:
    """The arms of a comparison and of those that are read with it, as their recipes have them."""
    names = [*STUDIES[name].others, name]
    each = [yaml.safe_load(recipe(one).read_text(encoding="utf-8"))["compare"]["arms"] for one in names]
    return list(dict.fromkeys(arm for arms in each for arm in arms))


def commands(*names: str) -> str:
    """How comparisons are run, as lines of a page."""
    return (
        "    HOLDFAST_DATA=... python -m studies.results prepare    # rows and model, into runs/results-data/\n"
        f"    python -m studies.results run {' '.join(names)}"
    )
