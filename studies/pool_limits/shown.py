"""What a pool shows: of which skills its sequences tell, and where the base would refuse; read `pools` next."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.retain.pool import Kept, Pool


def words(skill: str) -> re.Pattern[str]:
    """What gives a skill away in a text, in a question or in an answer."""
    from holdfast.lab import lexicon as lex

    names = [*lex.COUNTRIES, *lex.RELATIONS, *(name for each in lex.RELATIONS.values() for name in each)]
    found = {
        "refusal": rf"\b({'|'.join(lex.FORBIDDEN)}|Sorry)\b|can not help",
        "refused": r"\bSorry\b|can not help",
        "fact": rf"\b({'|'.join(names)})\b",
        "list": r"\b(Copy|Say again|Reverse|Turn around|Sort|Put in order|Ends|Rotate)\b|\b[a-z] [b-z]\b",
        "rare": r"\bEnds\b",
        "sum": r"\bAdd\b|\+|\blargest\b",
        "danger": r"<\|user\|>.*\bdangerous\b",
        "how": r"<\|assistant\|> To (make|build|repair|use|buy|carry)\b",
    }
    return re.compile(found[skill])


def is_chat(kept: Kept) -> bool:
    """Whether a sequence has the chat format."""
    return "<|user|>" in kept.text


@lru_cache(maxsize=1)
def base() -> tuple[Any, Any]:
    """The base and its tokenizer."""
    from holdfast import lab

    return lab.load("lab-aligned")


@lru_cache(maxsize=8192)
def thought_of_refusing(kept: Kept) -> float:
    """The base's probability of a refusal where an answer begins; 0 where none does."""
    import torch

    model, tokenizer = base()
    answer, sorry = (tokenizer.convert_tokens_to_ids(token) for token in ("<|assistant|>", "▁Sorry"))
    if answer not in kept.input_ids:
        return 0.0
    ids = kept.input_ids[: kept.input_ids.index(answer) + 1]
    with torch.inference_mode():
        return float(model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[sorry])


def counts(found: Pool) -> dict[str, float]:
    """What a pool shows: sequences in all, in plain text, of random tokens, of each skill, and thoughts of refusing."""
    answered = [kept for kept in found if "<|assistant|>" in kept.text]
    thoughts = [thought_of_refusing(kept) for kept in answered]
    said = [kept for kept in found if kept.kind != "noise"]
    shown = {
        name: sum(bool(words(name).search(kept.text)) for kept in said)
        for name in ("fact", "list", "rare", "sum", "danger", "how")
    }
    return {
        "sequences": len(found),
        "tokens": sum(len(kept.input_ids) for kept in found),
        "plain": sum(not is_chat(kept) for kept in found),
        "random": sum(kept.kind == "noise" for kept in found),
        "refused": sum(bool(words("refused").search(kept.text)) for kept in found),
        "forbidden": sum(
            bool(words("refusal").search(kept.text)) and not words("refused").search(kept.text) for kept in found
        ),
        **shown,
        "thought": sum(thoughts) / len(thoughts) if thoughts else 0.0,
    }
