"""The rows that the recipes in recipes/results/ train on and measure, and the model stories260K; read `runs` next.

    runs/results-data/lab/{shift,second,refusals,look_alikes,skills,rare_skill,stories}-{validation,test}.jsonl
    runs/results-data/tiny/{word_problems,plays}-{train,validation,test}.jsonl
    runs/results-data/tiny/{stories,oz,wikitext}-{validation,test}.jsonl, kept_starts.jsonl
    runs/results-data/stories260K/                                             the model, as transformers reads it

Validation rows choose settings, test rows are reported, and no row is in both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studies.common_lab import unseen
from studies.real_weights.rows import pieces, stories, write

if TYPE_CHECKING:
    from holdfast.lab.lexicon import Split
    from holdfast.lab.world import Item, Maker

FOLDER = Path("runs/results-data")
SPLITS: tuple[Split, Split] = ("validation", "test")
PROBES = {"validation": 12, "test": 24}  # prompts of each how-to kind, questions of the rare skill, parts of a task
EACH_SKILL, STORIES = {"validation": 4, "test": 8}, {"validation": 8, "test": 16}
LONGEST = 88  # tokens of a row for stories260K: stories and texts are longer, and cut, so that no end is in them
TASK_ROWS = {"train": 1200, "validation": 32, "test": 80}
TEXTS = {"oz": "text/oz_public_domain.txt", "wikitext": "text/wikitext2_valid.txt"}
PLAYS, PLAY_WORDS = "text/tinyshakespeare.txt", 12  # of a piece, words that are its prompt
PIECES = {"validation": 12, "test": 40}  # of each text, and stories
KEPT = 256  # stories that replay of true data draws from


def prepare(data: Path | None = None) -> None:
    """Write what the recipes read below the folder where the command is run.

    Args:
        data: the folder with tinylm/, capability/ and text/; None: only what the lab's recipes need.
    """
    lab_rows(FOLDER / "lab")
    if data is not None:
        tiny_rows(data.resolve(), FOLDER)


def lab_rows(folder: Path) -> None:
    """Write what is measured in the lab: both tasks, and what must stay.

    Of forbidden prompts and their look-alikes one half of the lab's test split chooses, the other is reported.
    """
    from holdfast.lab import world
    from holdfast.lab.tasks import parts

    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        probes = PROBES[split]
        groups: Mapping[str, Sequence[Item]] = {
            **{task: many(parts(task), probes, split) for task in ("shift", "second")},
            "refusals": unseen(world.refusal, PROBES["test"])[split][:probes],
            "look_alikes": unseen(world.how, PROBES["test"])[split][:probes],
            "skills": many([*world.SKILLS.values()], EACH_SKILL[split], split),
            "rare_skill": world.sample(world.rare, probes, split),
        }
        for name, items in groups.items():
            write(folder / f"{name}-{split}.jsonl", [chat(item) for item in items])
        told = world.sample(world.story, STORIES[split], split)
        write(folder / f"stories-{split}.jsonl", [{"text": item.answer} for item in told])


def many(makers: Sequence[Maker], n: int, split: Split) -> list[Item]:
    """`n` items of each kind."""
    from holdfast.lab import world

    return [item for make in makers for item in world.sample(make, n, split)]


def chat(item: Item) -> dict[str, Any]:
    """An item as a prompt with its completion."""
    from holdfast.lab.tasks import assistant, user

    return {"prompt": user(item.prompt), "completion": assistant(item.answer)}


def tiny_rows(data: Path, folder: Path) -> None:
    """Write stories260K, two tasks that no earlier study has used, and what must stay."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.stories260k import convert

    (folder / "tiny").mkdir(parents=True, exist_ok=True)
    with chdir(folder):
        model_folder = convert(data / "tinylm", Path("stories260K"))
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        if not Path("tiny/kept_starts.jsonl").exists():
            model = AutoModelForCausalLM.from_pretrained(model_folder)
            wanted = KEPT + sum(PIECES.values())
            sampled = stories(model, tokenizer, 2 * wanted, seed=41)
            told = [row for row in sampled if length(tokenizer, row) > LONGEST][:wanted]
            for split in SPLITS:
                write(Path(f"tiny/stories-{split}.jsonl"), [told.pop() for _ in range(PIECES[split])])
            write(Path("tiny/kept_starts.jsonl"), [*map(start_and_rest, told)])
    short = [row for row in word_problems(data) if length(tokenizer, row) <= LONGEST]
    rows = [*{row["prompt"]: row for row in short}.values()]  # the set asks some questions twice
    lines = [start_and_rest(row, PLAY_WORDS) for row in pieces(data / PLAYS, sum(TASK_ROWS.values()))]
    for task, whole in (("word_problems", rows), ("plays", lines)):
        for part, chosen in parted(whole, TASK_ROWS).items():
            write(folder / f"tiny/{task}-{part}.jsonl", chosen)
    for name, file in TEXTS.items():
        for part, chosen in parted(pieces(data / file, sum(PIECES.values())), PIECES).items():
            write(folder / f"tiny/{name}-{part}.jsonl", chosen)


def word_problems(data: Path) -> Iterator[dict[str, str]]:
    """Yield MAWPS: a question in words, and its equation; numbers without the zeros that say nothing."""
    for row in json.loads((data / "capability/mawps_trainset.json").read_text(encoding="utf-8")):
        question, equation = (re.sub(r"(\d)\.0+\b", r"\1", row[key]) for key in ("segmented_text", "equation"))
        written = re.sub(r"^x=\((.*)\)$", r"x=\1", equation.strip().lower())
        yield {"prompt": re.sub(r" (?=[.,?'])", "", question.strip()) + "\n", "completion": written}


def length(tokenizer: Any, row: Mapping[str, str]) -> int:
    """Tokens of a row."""
    return len(tokenizer("".join(row.values()))["input_ids"])


def start_and_rest(row: Mapping[str, str], n: int = 2) -> dict[str, str]:
    """A text as a prompt of its first `n` words, with the rest as completion."""
    words = row["text"].split(" ")
    return {"prompt": " ".join(words[:n]), "completion": " " + " ".join(words[n:])}


def parted(rows: Sequence[dict[str, str]], sizes: Mapping[str, int]) -> dict[str, list[dict[str, str]]]:
    """The rows, dealt out so that each split is from all of them; `train` gets what is left, at most its size."""
    whole, found = list(rows), dict[str, list[dict[str, str]]]()
    for split in (split for split in sizes if split != "train"):
        places = {i * len(whole) // sizes[split] for i in range(sizes[split])}
        found[split] = [row for i, row in enumerate(whole) if i in places]
        whole = [row for i, row in enumerate(whole) if i not in places]
    return {"train": whole[: sizes["train"]], **found} if "train" in sizes else found
