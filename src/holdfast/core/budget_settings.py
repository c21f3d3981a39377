"""What a method says of its budget: how much may drift in what measure, and how often that is measured.

    budget=0.02                        KL(base || student) at most 0.02 nats a token, on retain sequences held out
    budget={"perplexity": 0.01}        at most 0.01 of a measure that the host was given under this name

Read next: `budget`, which finds the strength.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

AUTO = "auto"
EVERY = 5  # optimizer steps between two measurements, where nothing is said
KL = ""  # the name of the measure where none is named
WANTED = (
    "how far the student may drift from the base, a number of nats a token above 0, such as 0.02; or the name of one "
    "measure and a number above 0, such as {refusal_margin: 0.01}"
)


def is_auto(strength: object) -> bool:
    """Return whether a strength is to be found.

    >>> is_auto("auto"), is_auto(1.0)
    (True, False)
    """
    return isinstance(strength, str) and strength == AUTO


def parted(budget: object) -> tuple[str, object]:
    """Return what a budget is measured in, and its number, unchecked; a mapping of several is its own number.

    >>> parted(0.02), parted({"refusal_margin": 0.01}), parted(("refusal_margin", 0.01))
    (('', 0.02), ('refusal_margin', 0.01), ('refusal_margin', 0.01))
    """
    pairs = list(budget.items()) if isinstance(budget, Mapping) else [budget]
    if len(pairs) == 1 and isinstance(pairs[0], tuple) and len(pairs[0]) == 2:
        return pairs[0]
    return KL, budget


def budget_faults(strength: object, budget: object, every: object) -> Iterator[str]:
    """Yield a sentence for everything that is wrong with a budget, or with its absence."""
    name, limit = parted(budget)
    if budget is None:
        if is_auto(strength):
            yield f"strength is 'auto', which needs a budget: {WANTED}"
    elif not isinstance(limit, int | float) or isinstance(limit, bool) or not (math.isfinite(limit) and limit > 0):
        yield f"budget is {WANTED}; got {budget!r}"
    elif not isinstance(name, str) or not (name or limit is budget):
        yield f"budget needs the name of its measure as text, got {name!r}"
    elif not is_auto(strength):
        yield f"budget={budget} is kept to by strength='auto' alone, and strength is {strength!r}: drop one of them"
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        yield f"budget_every must be a whole number >= 1, got {every!r}"
    elif every != EVERY and not is_auto(strength):
        yield f"budget_every={every} is of strength='auto', and strength is {strength!r}: drop it"
