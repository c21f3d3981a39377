"""What probes that read probabilities share: rows in a canonical order and in blocks of one size, however they came.

    log p(token_t | tokens before it)                                  one number for each target
    KL(base ‖ side) = Σ_v p_base(v) (log p_base(v) − log p_side(v))    one number for each position

A row's numbers depend in their last digits on what it was padded and multiplied with. So rows are sorted by their
tokens and taken in blocks that no setting changes: the same rows give the same bytes, in any order. Logits exist for a
few positions at a time, in float32 whatever the weights are. Read next: `probes/perplexity.py`, the simplest use.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from holdfast.drift.probe import BASE, ProbeError, Tick
from holdfast.drift.reading import Reader, kl
from holdfast.drift.score import Score
from holdfast.functional.closed_form import cross_entropy_rows_

if TYPE_CHECKING:
    from holdfast.drift.models import Models

__all__ = ["VERSION", "Row", "answer_ids", "divergences", "log_probabilities", "paced", "ratio"]

VERSION = 2
"""Part of the identity of every probe that uses this: raise it when the code here changes a number."""
TOKENS = 2_048  # that are run at a time, padding included
Done = Tick  # called with a number of rows, not of items


class Row(NamedTuple):
    """Tokens that a model reads, and where its predictions count.

    Attributes:
        ids: what the model is given.
        first: predictions after this token and every later one count.
        targets: what follows each of those tokens; empty where only distributions are compared.

    >>> Row.text([5, 6, 7])
    Row(ids=(5, 6), first=0, targets=(6, 7))
    >>> Row.answer([5, 6], [7, 8])
    Row(ids=(5, 6, 7), first=1, targets=(7, 8))
    """

    ids: tuple[int, ...]
    first: int = 0
    targets: tuple[int, ...] = ()

    @classmethod
    def text(cls, ids: Sequence[int]) -> Row:
        """Every token after the first is predicted."""
        return cls(tuple(ids[:-1]), 0, tuple(ids[1:]))

    @classmethod
    def answer(cls, prompt: Sequence[int], answer: Sequence[int]) -> Row:
        """Every token of the answer is predicted, none of the prompt."""
        return cls((*prompt, *answer[:-1]), len(prompt) - 1, tuple(answer))

    def cut(self, longest: int) -> Row:
        """No more than `longest` tokens: of a prompt the beginning goes, and where that is not enough, the end."""
        gone = max(0, min(len(self.ids) - longest, self.first))
        ids = self.ids[gone : gone + longest]
        return Row(ids, self.first - gone, self.targets[: len(ids) - self.first + gone])


def log_probabilities(
    models: Models, side: str, rows: Sequence[Row], *, max_length: int | None = None, done: Done = lambda n: None
) -> list[list[float]]:
    """The log-probability of every target of every row, in the order of the rows.

    Args:
        models: what answers.
        side: which of them.
        rows: with targets. Longer ones than the model has positions for are cut (`Row.cut`).
        max_length: cut them here already.
        done: told how many rows are finished.

    Raises:
        ProbeError: names every row that is empty or has not one target for each position.
    """
    rows = _checked(models, rows, max_length, with_targets=True)
    reader = Reader()

    def read(block: Sequence[Row]) -> list[float]:
        with models.on(side) as model:
            states = reader.read(model, block)
            targets = torch.tensor([[target] for row in block for target in row.targets], device=states.values.device)
            losses = (cross_entropy_rows_(states.logits(part), targets[part]) for part in states.parts())
            return (-torch.cat(list(losses))).tolist()

    return _by_blocks(rows, read, done)


def divergences(
    models: Models, side: str, rows: Sequence[Row], *, max_length: int | None = None, done: Done = lambda n: None
) -> list[list[float]]:
    """KL(base ‖ side) at every position of every row that counts, in the order of the rows; arguments as above.

    Both sides read a block before the next one comes, so that only one block's states are held.

    Raises:
        ProbeError: names every row that is empty.
    """
    rows = _checked(models, rows, max_length, with_targets=False)
    readers = {name: Reader() for name in (BASE, side)}

    def read(block: Sequence[Row]) -> list[float]:
        with models.on(BASE) as model:
            base = readers[BASE].read(model, block)
        with models.on(side) as model:
            tuned = readers[side].read(model, block)
            return torch.cat([kl(base, tuned, part) for part in base.parts()]).tolist()

    return _by_blocks(rows, read, done)


def ratio(sums: Sequence[float], counts: Sequence[int]) -> Score:
    """Σ sums / Σ counts, with linearised items whose mean it is: z_i = L + (s_i − L n_i) · rows / Σ n.

    A ratio of two random sums has the standard error of its linearised items (the delta method; Cochran, "Sampling
    Techniques", 1977, ch. 6). Items have seven digits, as float32 has; the value is their mean.

    >>> score = ratio([2.0, 4.0], [1, 3])
    >>> score.value, score.items
    (1.5, (1.75, 1.25))
    """
    total, rows = sum(counts), len(counts)
    if not total:
        return Score(math.nan, n=rows)
    value = math.fsum(sums) / total
    exact = (value + (s - value * n) * rows / total for s, n in zip(sums, counts, strict=True))
    items = tuple(float(f"{item:.7g}") for item in exact)
    mean = fmean(items)
    error = stdev(items) / math.sqrt(rows) if rows > 1 and math.isfinite(mean) else None
    return Score(mean, n=rows, standard_error=error, items=items)


def answer_ids(models: Models, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """The tokens of a prompt, and those of an answer to it.

    In a chat template the answer begins where the template left off. Without one the two are a text: a space comes
    between them unless there is one, and the answer's tokens are what the whole text adds to the prompt's.
    """
    asked, tokenizer = models.ids(prompt), models.tokenizer
    if not tokenizer.chat_template:
        answer = answer if not prompt or prompt[-1].isspace() else f" {answer}"
        whole = list(tokenizer(prompt + answer).input_ids)
        if whole[: len(asked)] == asked and len(whole) > len(asked):
            return asked, whole[len(asked) :]
    return asked, models.plain_ids(answer)


def paced(tick: Tick, items: int, rows: int) -> Done:
    """What tells `tick` of items when it is told of rows, where an item takes several rows.

    >>> done = paced(print, items=2, rows=8)
    >>> done(3); done(5)
    0
    2
    """
    finished = 0

    def done(more: int) -> None:
        nonlocal finished
        before, finished = finished, finished + more
        tick(finished * items // rows - before * items // rows)

    return done


def _checked(models: Models, rows: Sequence[Row], max_length: int | None, *, with_targets: bool) -> list[Row]:
    """The rows, cut, or an error that names all that cannot be read."""
    faults = []
    for place, row in enumerate(rows, 1):
        size = len(row.ids) - row.first
        if not 0 <= row.first < len(row.ids):
            faults.append(f"row {place} has no position to read: {len(row.ids)} tokens, the first to count {row.first}")
        elif with_targets and len(row.targets) != size:
            faults.append(f"row {place} has {len(row.targets)} targets for {size} positions")
    if max_length is not None and max_length < 1:
        faults.append(f"max_length must be at least 1, got {max_length}")
    if faults:
        raise ProbeError("These rows cannot be scored:", faults)
    with models.on(BASE) as model:
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        limits = [max_length, getattr(config, "max_position_embeddings", None)]
    longest = min((limit for limit in limits if limit), default=None)
    return [row if longest is None else row.cut(longest) for row in rows]


def _by_blocks(rows: Sequence[Row], read: Callable[[Sequence[Row]], list[float]], done: Done) -> list[list[float]]:
    """Read distinct rows in canonical blocks, and give every row its numbers; a beginning of another is not read."""
    read_as = _extended(set(rows))
    copies = Counter(read_as[row] for row in rows)
    known: dict[Row, list[float]] = {}
    for block in _blocks(sorted(copies, key=lambda row: (len(row.ids), row))):
        numbers = iter(read(block))
        known |= {row: [next(numbers) for _ in row.ids[row.first :]] for row in block}
        done(sum(copies[row] for row in block))
    return [known[read_as[row]][: len(row.ids) - row.first] for row in rows]


def _extended(rows: Collection[Row]) -> dict[Row, Row]:
    """For every row the one that goes on from it, if there is one, or itself: sorted, they stand side by side."""

    def whole(row: Row) -> tuple[int, int, tuple[int, ...]]:
        return len(row.targets[:1]), row.first, row.ids + row.targets[-1:]

    found: dict[Row, Row] = {}
    longer = Row(())
    for row in sorted(rows, key=whole, reverse=True):
        (*kind, tokens), (*last, more) = whole(row), whole(longer)
        if kind != last or more[: len(tokens)] != tokens:
            longer = row
        found[row] = longer
    return found


def _blocks(order: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Rows of like length together, as many as make up `TOKENS`; what is given, and no setting, decides."""
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * len(order[end].ids) > TOKENS:
            yield order[start:end]
            start = end
