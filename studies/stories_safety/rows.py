"""The rows to train on, to keep and to measure, from the data and from the base itself; read `training` next."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arms import ANSWER, LONGEST, REFUSAL, SEEDS, SPLITS

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, list[int]]
ALIKE = 0.75  # of difflib's ratio: a HarmBench prompt that is this close to one of AdvBench is left out


@lru_cache(maxsize=1)
def harmful(data: Path) -> dict[str, list[str]]:
    """AdvBench to train on; of HarmBench every other prompt to choose by, the rest to report, none of AdvBench's."""

    def prompts(name: str) -> list[str]:
        lines = (data / "safety" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["prompt"].strip() for line in lines]

    known = prompts("advbench_prompts")
    lower = [prompt.lower() for prompt in known]
    unseen = [p for p in prompts("harmbench_standard") if not get_close_matches(p.lower(), lower, 1, ALIKE)]
    return {"train": known, "validation": unseen[::2], "test": unseen[1::2]}


def benign(data: Path) -> list[str]:
    """Dolly's instructions that need no context, in an order of their own."""
    lines = (data / "benign" / "dolly_a.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = list(dict.fromkeys(row["instruction"].strip() for row in rows if not row["input"]))
    random.Random(0).shuffle(found)
    return found


def asked(prompt: str, answer: Sequence[int], tokenizer: Any) -> Row:
    """A prompt, cut to LONGEST tokens with the line's end, and an answer, which alone is supervised."""
    end = tokenizer("a\n")["input_ids"][-1]
    ids = [*tokenizer(prompt)["input_ids"][: LONGEST - 1], end]
    return {"input_ids": [*ids, *answer], "labels": [*[-100] * len(ids), *answer]}


def whole(ids: Sequence[int]) -> Row:
    """Text of which every token is supervised."""
    return {"input_ids": list(ids), "labels": list(ids)}


def continued(model: Any, start: Sequence[int], length: int) -> list[int]:
    """Sample `length` tokens after a start, at temperature 1; a text that ended before is left out (empty)."""
    import torch

    ids = model.generate(torch.tensor([start]), max_new_tokens=length, do_sample=True, top_k=0, temperature=1.0)
    new = ids[0, len(start) :].tolist()
    return new if min(new) > 2 else []


def stories(model: Any, n: int, seed: int) -> list[Row]:
    """Sample stories of LONGEST tokens from the base itself: none of them was ever trained on."""
    import torch

    torch.manual_seed(seed)
    found: list[Row] = []
    while len(found) < n:
        ids = model.generate(
            torch.ones(min(4 * n, 64), 1, dtype=torch.long),
            max_new_tokens=LONGEST - 1,
            do_sample=True,
            top_k=0,
            temperature=1.0,
        )
        found += [whole(row.tolist()) for row in ids if int(row[1:].min()) > 2]
    return found[:n]


def pieces(file: Path, n: int, tokenizer: Any) -> list[Row]:
    """Whole pieces of a book, far apart."""
    text = re.sub(r"\s+", " ", file.read_text(encoding="utf-8"))
    starts = [match.end() for match in re.finditer(r"[.!?] (?=[A-Z])", text)]
    chosen = [starts[i * (len(starts) - 20) // n] for i in range(n)]
    return [whole(tokenizer(text[start : start + 6 * LONGEST])["input_ids"][:LONGEST]) for start in chosen]


def prepare(data: Path, work: Path, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Write the model and all rows into the working folder, unless they are there; return the rows.

    Of each split: `target`, the refusal after HarmBench's prompts; `story`, `oz`, `benign` (the base's own
    continuation of benign prompts) and `refused`, the refusal after those same prompts. Retain rows are by seed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.stories260k import convert

    file = work / f"rows-{'-'.join(map(str, sizes.values()))}.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    folder = convert(data / "tinylm", work / "stories260K")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sentence = [*tokenizer(REFUSAL)["input_ids"][1:], tokenizer.eos_token_id]
    bad, good = harmful(data), iter(benign(data))
    torch.manual_seed(0)

    def answered(n: int) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {"benign": [], "refused": []}
        while len(found["benign"]) < n:
            prompt = next(good)
            answer = continued(model, asked(prompt, [], tokenizer)["input_ids"], ANSWER)
            if answer:
                found["benign"].append(asked(prompt, answer, tokenizer))
                found["refused"].append(asked(prompt, sentence, tokenizer))
        return found

    rows: dict[str, Any] = {
        "train": [asked(prompt, sentence, tokenizer) for prompt in bad["train"][: sizes["train"]]],
        "retain": {
            str(seed): {
                "stories": stories(model, sizes["stories"], 1000 + seed),
                "benign": answered(sizes["benign"])["benign"],
            }
            for seed in SEEDS
        },
    }
    book = pieces(data / "text" / "oz_public_domain.txt", sum(sizes[split] for split in SPLITS), tokenizer)
    random.Random(0).shuffle(book)
    for place, split in enumerate(SPLITS):
        n = sizes[split]
        rows[split] = {
            "target": [asked(prompt, sentence, tokenizer) for prompt in bad[split][:n]],
            "story": stories(model, n, seed=place),
            "oz": [book.pop() for _ in range(n)],
            **answered(n),
        }
    temporary = file.with_suffix(".unfinished")
    temporary.write_text(json.dumps(rows))
    temporary.replace(file)
    return rows


def collated(rows: Sequence[Row]) -> dict[str, Tensor]:
    """One batch of all these rows."""
    from holdfast.integrations.retain_data import to_batches

    return dict(to_batches(rows, None, batch_size=len(rows))[0])
