"""The scenario `stories`: WikiSQL's rows and the base's own stories, as `studies/real_weights.py` makes them."""

from __future__ import annotations

import json
import random
from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studies import real_weights

from .arms import SPLITS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SIZES = {"train": 1600, "validation": 48, "test": 64}
STORIES = 160  # to estimate a Fisher on; each seed draws its rows from them


def prepare(data: Path, work: Path, sizes: dict[str, int] = SIZES) -> None:
    """Write the model and all rows into the working folder, unless they are there."""
    work.mkdir(parents=True, exist_ok=True)
    with chdir(work):
        if Path("story-retain.jsonl").exists():
            return
        real_weights.prepare(data, sizes)
        kept = real_weights.stories(load(Path())[0], load(Path())[1], STORIES, seed=12345)
        real_weights.write(Path("story-retain.jsonl"), kept)


def load(work: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = work / "stories260K"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def read(work: Path, name: str) -> list[dict[str, Any]]:
    """The rows of one file."""
    return [json.loads(line) for line in (work / f"{name}.jsonl").read_text().splitlines()]


def training(work: Path, n: int, seed: int, kept: int) -> tuple[list[Any], dict[str, list[Any]]]:
    """Task rows in the seed's order, every one before any comes again; and the seed's retain rows, by set."""
    shuffle, pool = random.Random(seed), read(work, "sql-train")
    rows = [row for _ in range(n // len(pool) + 1) for row in shuffle.sample(pool, len(pool))]
    stories = shuffle.sample(read(work, "story-retain"), min(kept, STORIES))
    return rows[:n], {"stories": stories, "task": shuffle.sample(pool, min(kept, len(pool)))}


def measured(work: Path) -> dict[str, dict[str, list[dict[str, list[int]]]]]:
    """By split, tokenised: the answers to held-out questions, and stories sampled from the base."""
    from holdfast.integrations.retain_data import to_batches

    _, tokenizer = load(work)

    def tokens(name: str) -> list[dict[str, list[int]]]:
        single = to_batches(read(work, name), tokenizer, batch_size=1)
        return [{key: row[key][0].tolist() for key in ("input_ids", "labels")} for row in single]

    return {split: {"target": tokens(f"sql-{split}"), "story": tokens(f"story-{split}")} for split in SPLITS}
