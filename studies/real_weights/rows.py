"""The rows to train on and to measure, and the pool, from the data and from the base itself; read `training` next."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import chdir
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arms import POOL, POOL_TOKENS, SPLITS, TASKS

if TYPE_CHECKING:
    from holdfast.retain.pool import Pool
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST = 80  # tokens of a row
SIZES = {"train": 6000, "validation": 48, "test": 160}
TEXTS = {"oz": "text/oz_public_domain.txt", "wiki": "text/wikitext2_valid.txt"}
PIECES = {"validation": 12, "test": 64}  # of each text
Tokens = dict[str, list[int]]


def task_rows(task: str, data: Path, part: str) -> Iterator[dict[str, str]]:
    """Yield prompt and completion; validation rows are the end of the training file."""
    lines = (data / TASKS[task].files[part == "test"]).read_text(encoding="utf-8").splitlines()
    chosen = {"train": lines[:-1000], "validation": lines[-1000:], "test": lines}[part]
    for row in map(json.loads, chosen):
        if task == "sql":
            yield {"prompt": row["question"].strip() + "\n", "completion": " ".join(row["sql"].split())}
        else:
            question = re.split(r"(?<=[.!?])\s+", row["question"].strip())[-1]
            step = re.sub(r"<<.*?>>", "", row["answer"]).split("\n")[0].strip()
            yield {"prompt": question + "\n", "completion": step}


def stories(model: Any, tokenizer: Any, n: int, seed: int) -> list[dict[str, str]]:
    """Sample stories from the base itself at temperature 1: none of them was ever trained on."""
    import torch

    torch.manual_seed(seed)
    found: list[dict[str, str]] = []
    while len(found) < n:
        ids = model.generate(
            torch.ones(64, 1, dtype=torch.long), max_new_tokens=LONGEST + 10, do_sample=True, top_k=0, temperature=1.0
        )
        whole = [row for row in ids if not (row[1:] <= 2).any()]  # not ended: cut at LONGEST, no end is missing
        found += [{"text": tokenizer.decode(row, skip_special_tokens=True)} for row in whole]
    return found[:n]


def pieces(file: Path, n: int) -> list[dict[str, str]]:
    """Pieces of a text, far apart, from the start of a sentence; none with a word that the file left out."""
    text = re.sub(r"\s+", " ", file.read_text(encoding="utf-8"))
    length = 6 * LONGEST
    starts = [match.end() for match in re.finditer(r"[.!?] (?=[A-Z])", text[:-length])]
    found = [text[start : start + length] for start in starts if "<unk>" not in text[start : start + length // 2]]
    return [{"text": found[i * len(found) // n]} for i in range(n)]


def prepare(data: Path, sizes: Mapping[str, int]) -> None:
    """Write the model, the tasks' rows and the stories into the working folder, unless they are there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.stories260k import convert

    folder = convert(data / "tinylm", Path("stories260K"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for part, n in sizes.items():
        for task in TASKS:
            rows = (
                row
                for row in task_rows(task, data, part)
                if len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) < LONGEST
            )
            write(Path(f"{task}-{part}.jsonl"), [row for row, _ in zip(rows, range(n), strict=False)])
        if part != "train" and not Path(f"story-{part}.jsonl").exists():
            write(Path(f"story-{part}.jsonl"), stories(model, tokenizer, n, seed=n))


def complete(data: Path, work: Path, sizes: Mapping[str, int] = SIZES, texts: Mapping[str, int] = PIECES) -> None:
    """Write all that the runs need into the working folder: `prepare`'s files and the texts that no pool covers.

    Of each text every fourth or fifth piece, so that both splits are from all of it, is for validation.
    """
    work.mkdir(parents=True, exist_ok=True)
    with chdir(work):
        prepare(data, sizes)
        for name, file in TEXTS.items():
            whole = pieces(data / file, sum(texts.values()))
            chosen = {i * len(whole) // texts["validation"] for i in range(texts["validation"])}
            for part in SPLITS:
                inside = [row for i, row in enumerate(whole) if (i in chosen) == (part == "validation")]
                write(Path(f"{name}-{part}.jsonl"), inside)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    temporary = path.with_suffix(".unfinished")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(path)


def read(work: Path, name: str) -> list[dict[str, Any]]:
    """The rows of one file."""
    return [json.loads(line) for line in (work / f"{name}.jsonl").read_text().splitlines()]


def load(work: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = work / "stories260K"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@lru_cache(maxsize=2)
def measured(work: Path, task: str) -> dict[str, dict[str, list[Tokens]]]:
    """By split, tokenised: the answers to held-out questions, stories sampled from the base, and the other texts."""
    from holdfast.integrations.retain_data import to_batches

    _, tokenizer = load(work)

    def tokens(name: str) -> list[Tokens]:
        single = to_batches(read(work, name), tokenizer, batch_size=1, max_length=LONGEST)
        return [{key: row[key][0].tolist() for key in ("input_ids", "labels")} for row in single]

    files = {"target": task, "story": "story", **{name: name for name in TEXTS}}
    return {split: {name: tokens(f"{file}-{split}") for name, file in files.items()} for split in SPLITS}


def pool_of(work: Path, seed: int) -> Pool:
    """The pool of a seed: sampled from the base itself, once, and read from the working folder from then on."""
    from holdfast.retain.making import make
    from holdfast.retain.pool import Pool
    from holdfast.retain.settings import Settings

    folder = work / f"pool-{seed}"
    model, tokenizer = load(work)
    if not (folder / "manifest.json").exists():
        make(model, tokenizer, Settings(n=POOL, max_tokens=POOL_TOKENS, seed=1000 + seed)).save(folder)
    return Pool.load(folder, tokenizer=tokenizer, base=model)
