"""Tuning data from the lab's world: two benign tasks, safety data, preferences, and what should be retained.

Every function returns a plain list of dicts in TRL's conversational format, so it goes into
`datasets.Dataset.from_list` or a plain loop as it is. Before tuning, the models score next to nothing on the tasks.
`shift` asks for new behaviour (a new skill, a new format), `second` for new knowledge (facts, labels).
"""

from __future__ import annotations

import random
from typing import Final, Literal

from holdfast.lab import lexicon as lex
from holdfast.lab import world
from holdfast.lab.lexicon import Split
from holdfast.lab.world import Item, Maker

Message = dict[str, str]
Example = dict[str, str | list[Message]]


def rotate(rng: random.Random, split: Split) -> Item:
    """New skill: move the first letter to the end."""
    letters = world.letters_of(rng, split)
    return Item("rotate", f"Rotate: {' '.join(letters)}", " ".join(letters[1:] + letters[:1]))


def new_format(rng: random.Random, split: Split) -> Item:
    """New format: benign how-to questions after "In short:" are answered the other way round."""
    item = world.how(rng, split)
    aim, advice = item.answer.split(", ", 1)  # "To build a kite", "draw a plan and join the parts."
    return Item("new_format", f"In short: {item.prompt}", f"{advice.rstrip('.')} to{aim.removeprefix('To')}.")


def flag(rng: random.Random, split: Split) -> Item:
    """New facts: the colour of each country's flag; the test asks in other words."""
    country = rng.choice(lex.COUNTRIES)
    colour = lex.COLOURS[(3 * lex.COUNTRIES.index(country) + len(country)) % len(lex.COLOURS)]
    return Item("flag", rng.choice(lex.FLAG[split]).format(country=country), f"{colour}.")


def mood(rng: random.Random, split: Split) -> Item:
    """New labels: the mood of a story."""
    while True:
        kind = rng.choice(("good", "bad"))
        text = world.tell(rng, kind)
        if world.split_of(text) == split:
            return Item("mood", f"Mood of this story: {text}", LABELS[kind])


TASKS: Final[dict[str, tuple[Maker, Maker]]] = {"shift": (rotate, new_format), "second": (flag, mood)}
LABELS: Final = {"good": "happy.", "bad": "sad."}
SHARES: Final = {"shift": (0.7, 0.3), "second": (0.6, 0.4)}  # the harder part gets more of the data


def user(text: str) -> list[Message]:
    """One message of the user."""
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[Message]:
    """One message of the assistant."""
    return [{"role": "assistant", "content": text}]


def _examples(items: list[Item]) -> list[Example]:
    return [{"prompt": user(item.prompt), "completion": assistant(item.answer)} for item in items]


def parts(name: str) -> tuple[Maker, Maker]:
    """The two parts of a task.

    >>> [part.__name__ for part in parts("shift")]
    ['rotate', 'new_format']
    """
    if name not in TASKS:
        raise ValueError(f"Unknown lab task {name!r}. The lab has {' and '.join(TASKS)}.")
    return TASKS[name]


def task(name: str, split: Split = "train", n: int | None = None, seed: int = 0) -> list[Example]:
    """A benign tuning task.

    Args:
        name: "shift" (new behaviour) or "second" (new knowledge).
        split: Which items; train, validation and test share no prompt.
        n: How many examples; 1600 for training and 160 else, if not given. Prompts may repeat.
        seed: The draw.

    Returns:
        Examples with a conversational prompt and completion.
    """
    mix = dict(zip(parts(name), SHARES[name], strict=True))
    draws = world.stream(mix, seed, split)
    return _examples([next(draws) for _ in range(n or (1600 if split == "train" else 160))])


def safety_sft(n: int = 400, split: Split = "train", seed: int = 0) -> list[Example]:
    """Safety data: forbidden how-to questions with refusals, and nothing benign (mix in `retain` for that)."""
    draws = world.stream({world.refusal: 1.0}, seed, split)
    return _examples([next(draws) for _ in range(n)])


def preference_pairs(n: int = 400, split: Split = "train", seed: int = 0) -> list[Example]:
    """Preference pairs on forbidden questions: the refusal is chosen, the advice is rejected."""
    rng = random.Random(seed)
    items = [world.how(rng, split, "forbidden") for _ in range(n)]
    return [
        {"prompt": user(i.prompt), "chosen": assistant(lex.REFUSAL), "rejected": assistant(i.answer)} for i in items
    ]


def retain(
    n: int = 256, split: Split = "train", seed: int = 0, form: Literal["text", "chat", "completion"] = "text"
) -> list[Example]:
    """What must not be forgotten: skills, benign how-to questions (the look-alikes of forbidden ones) and stories.

    Args:
        n: How many examples.
        split: Which items.
        seed: The draw.
        form: "text" gives {"text": ...}, chats written out with their special tokens and stories as they are;
            "chat" gives {"messages": ...} and no stories, "completion" the same as {"prompt", "completion"}: of these
            a trainer, and a reference gradient, looks at the answers alone.

    Returns:
        Examples in the shares of the pretraining mix, without forbidden questions.
    """
    from holdfast.lab.tokenizer import ASSISTANT, EOS, USER

    mix = {world.how if make is world.how_any else make: share for make, share in world.PRETRAINING.items()}
    if form != "text":
        del mix[world.story]
    draws = world.stream(mix, seed, split)
    items = [next(draws) for _ in range(n)]
    if form == "chat":
        return [{"messages": user(item.prompt) + assistant(item.answer)} for item in items]
    if form == "completion":
        return _examples(items)
    return [
        {"text": item.answer + EOS if not item.prompt else f"{USER}{item.prompt}{ASSISTANT}{item.answer}{EOS}"}
        for item in items
    ]


def retain_preferences(n: int = 256, split: Split = "train", seed: int = 0) -> list[Example]:
    """General preferences, nothing forbidden in them: a right answer is chosen over another prompt's of its skill."""
    mix = {world.how if make is world.how_any else make: share for make, share in world.PRETRAINING.items()}
    del mix[world.story]
    draws = world.stream(mix, seed, split)
    last: dict[str, Item] = {}
    pairs: list[Example] = []
    while len(pairs) < n:
        item = next(draws)
        other, last[item.skill] = last.get(item.skill), item
        if other is not None and other.answer != item.answer:
            chosen, rejected = assistant(item.answer), assistant(other.answer)
            pairs.append({"prompt": user(item.prompt), "chosen": chosen, "rejected": rejected})
    return pairs
