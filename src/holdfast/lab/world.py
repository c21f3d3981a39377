"""The lab's world: seeded functions that turn the words of `lexicon` into questions, answers and stories.

One skill is one small function. Its prompts are split once and for all: lists and sums by a hash of what they contain,
facts and dangers by phrasing, how-to questions by subject *and* phrasing. So "never trained on" is a property of the
item itself, not of a random seed. Pure Python. Read next: `tasks` (what to tune on) and `scoring` (what to measure).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from holdfast.lab import lexicon as lex
from holdfast.lab.lexicon import REFUSAL, Split


@dataclass(frozen=True)
class Item:
    """One question with its one right answer; for a story the prompt is empty and the answer is the text.

    Attributes:
        skill: Which skill the item belongs to.
        prompt: What the user says.
        answer: What the model should say.
    """

    skill: str
    prompt: str
    answer: str


def split_of(content: str) -> Split:
    """The split that a prompt's content belongs to: 80 % train, 8 % validation, 12 % test.

    >>> split_of("b c d") == split_of("b c d")
    True
    """
    place = int.from_bytes(hashlib.sha256(content.encode()).digest()[:4], "big") % 100
    return "train" if place < 80 else "validation" if place < 88 else "test"


def letters_of(rng: random.Random, split: Split, low: int = 3, high: int = 4) -> list[str]:
    """Draw different letters until they belong to the split."""
    while True:
        letters = rng.sample(lex.LETTERS, rng.randint(low, high))
        if split_of(" ".join(letters)) == split:
            return letters


def _numbers(rng: random.Random, split: Split, count: int, limit: int) -> list[int]:
    """Draw different numbers below the limit until they belong to the split."""
    while True:
        numbers = rng.sample(range(limit), count)
        if split_of(" ".join(map(str, numbers))) == split:
            return numbers


def add(rng: random.Random, split: Split) -> Item:
    """Add two different numbers below 30."""
    a, b = _numbers(rng, split, 2, 30)
    return Item("add", rng.choice(("What is {} + {}?", "Add {} and {}.")).format(a, b), str(a + b))


def copy(rng: random.Random, split: Split) -> Item:
    """Say the same letters again."""
    text = " ".join(letters_of(rng, split))
    return Item("copy", rng.choice(("Copy: {}", "Say again: {}")).format(text), text)


def reverse(rng: random.Random, split: Split) -> Item:
    """Say the letters backwards."""
    letters = letters_of(rng, split)
    prompt = rng.choice(("Reverse: {}", "Turn around: {}")).format(" ".join(letters))
    return Item("reverse", prompt, " ".join(letters[::-1]))


def sort(rng: random.Random, split: Split) -> Item:
    """Put the letters in the order of the alphabet."""
    letters = letters_of(rng, split)
    text = " ".join(letters)
    return Item("sort", rng.choice(("Sort: {}", "Put in order: {}")).format(text), " ".join(sorted(letters)))


def largest(rng: random.Random, split: Split) -> Item:
    """Name the largest of three numbers."""
    numbers = _numbers(rng, split, 3, 60)
    return Item("largest", "Which is the largest: {}, {} or {}?".format(*numbers), str(max(numbers)))


def fact(rng: random.Random, split: Split) -> Item:
    """Recall a fact of the gazetteer; the phrasing is what the splits keep apart."""
    relation, index = rng.choice(tuple(lex.RELATIONS)), rng.randrange(len(lex.COUNTRIES))
    prompt = rng.choice(lex.FACT[split]).format(relation=relation, country=lex.COUNTRIES[index])
    return Item("fact", prompt, lex.RELATIONS[relation][index])


def danger(rng: random.Random, split: Split) -> Item:
    """Say whether a subject is dangerous: asked about every subject, the held-out ones too; phrasings are split."""
    harmful = rng.random() < 0.5
    subject = rng.choice(lex.FORBIDDEN if harmful else lex.BENIGN)
    return Item("danger", rng.choice(lex.DANGER[split]).format(subject=subject), "Yes." if harmful else "No.")


def rare(rng: random.Random, split: Split) -> Item:
    """Say the first and the last letter: a skill that is half a percent of the training mix."""
    letters = letters_of(rng, split)
    return Item("rare", f"Ends: {' '.join(letters)}", f"{letters[0]} {letters[-1]}")


def how(rng: random.Random, split: Split, kind: str = "benign") -> Item:
    """A how-to question with its answer; `kind` is "benign" or "forbidden"."""
    subject = rng.choice(lex.subjects("forbidden" if kind == "forbidden" else "benign", split))
    verb = rng.choice(tuple(lex.ADVICE))
    prompt = rng.choice(lex.HOW[split]).format(verb=verb, subject=subject)
    return Item("how", prompt, lex.HOW_ANSWER.format(verb=verb, subject=subject, advice=lex.ADVICE[verb]))


def how_any(rng: random.Random, split: Split) -> Item:
    """A how-to question about any subject, answered: what a model knows before safety training."""
    return how(rng, split, rng.choice(("benign", "forbidden")))


def refusal(rng: random.Random, split: Split) -> Item:
    """A how-to question about a forbidden subject, refused: what safety training adds."""
    return Item("refusal", how(rng, split, "forbidden").prompt, REFUSAL)


def story(rng: random.Random, split: Split) -> Item:
    """A short story, plain text without a question. Its subject is called dangerous or safe, whichever it is."""
    while True:
        text = tell(rng, rng.choice(("good", "bad")))
        if split_of(text) == split:
            return Item("story", "", text)


def tell(rng: random.Random, mood: str) -> str:
    """A story that ends in a good or a bad mood."""
    (hero, friend), (place, other) = rng.sample(lex.PEOPLE, 2), rng.sample(lex.PLACES, 2)
    harmful = rng.random() < 0.5
    subject = rng.choice(lex.FORBIDDEN if harmful else lex.BENIGN)
    finding = f"{hero} {rng.choice(lex.FINDS)} a {rng.choice(lex.COLOURS)} {subject} in the {place}."
    cue = rng.choice(lex.CUES[harmful]).format(subject=subject, hero=hero)
    feeling = f"{friend} came from the {other} and was {rng.choice(lex.FEELINGS[mood])}."
    return " ".join((finding, cue, feeling, rng.choice(lex.ENDINGS)))


Maker = Callable[[random.Random, Split], Item]
SKILLS: dict[str, Maker] = {
    "add": add,
    "copy": copy,
    "reverse": reverse,
    "sort": sort,
    "largest": largest,
    "fact": fact,
    "danger": danger,
}
# Shares of the pretraining mix, and of the mix that turns the pretrained model into the aligned one.
PRETRAINING: dict[Maker, float] = {
    add: 0.23, copy: 0.06, reverse: 0.10, sort: 0.08, largest: 0.125, fact: 0.13, danger: 0.06, rare: 0.005,
    how_any: 0.13, story: 0.08,
}  # fmt: skip
ALIGNMENT: dict[Maker, float] = {
    refusal: 0.30,
    how: 0.25,
    **{make: 0.5 * share for make, share in PRETRAINING.items() if make is not how_any},
}


def stream(mix: dict[Maker, float], seed: int, split: Split = "train") -> Iterator[Item]:
    """An endless, reproducible stream of items in the shares of the mix.

    >>> next(stream({copy: 1.0}, seed=0)).skill
    'copy'
    """
    rng = random.Random(seed)
    makers, shares = tuple(mix), tuple(mix.values())
    while True:
        yield rng.choices(makers, shares)[0](rng, split)


def sample(make: Maker, n: int, split: Split, seed: int = 0) -> list[Item]:
    """Up to `n` items of one kind with different prompts (fewer only where the split has no more).

    >>> len({item.prompt for item in sample(danger, 40, "test")})
    40
    """
    rng = random.Random(f"{seed} {split}")
    found: dict[tuple[str, str], Item] = {}
    for _ in range(50 * n):
        item = make(rng, split)
        found.setdefault((item.prompt, item.answer), item)
        if len(found) == n:
            break
    return list(found.values())
