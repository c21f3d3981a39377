"""Chat formats: what a template puts before and after a user's words, found by rendering a word that nobody says.

    rendered = before + content + after          after ends where the answer begins

One template has as many formats as system prompts it can be given. What has no format (no template, a template that
refuses or ignores a system prompt) is told, not hidden. Read next: `sources`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["SYSTEM", "ChatFormat", "Messages", "chat_formats", "special_ids", "turn_end"]

Messages = Sequence[Mapping[str, Any]]
SENTINEL = "XqzvHoldfastXqzv"
SYSTEM = (
    "You are a helpful assistant.",
    "You are an expert who answers briefly and to the point.",
    "You answer politely, and you say so when you do not know something.",
)
"""Built-in system prompts, of the kind that people write."""


@dataclass(frozen=True)
class ChatFormat:
    """One way in which a user's words are put to the model.

    Attributes:
        name: for people.
        system: the system prompt; None: none was given.
        before: the text in front of the user's words.
        after: the text behind them, up to where the answer begins.
    """

    name: str
    system: str | None
    before: str
    after: str

    def render(self, content: str) -> str:
        """The text of a user's turn, ready to be answered.

        >>> ChatFormat("plain", None, "<user>", "<assistant>").render("Hello")
        '<user>Hello<assistant>'
        """
        return self.before + content + self.after

    def cut(self, text: str) -> str:
        r"""An invented user's turn up to a marker of the template's that is plain text, and so no end for sampling.

        >>> ChatFormat("plain", None, "### User:\n", "\n### Answer:\n").cut("Why?\n### Answer: because")
        'Why?'
        """
        last, first = self.before.strip().splitlines()[-1:], self.after.strip().splitlines()[:1]
        for marker in (*last, *first):
            text = text.split(marker)[0]
        return text.strip()


def chat_formats(tokenizer: Any, systems: Sequence[str] = SYSTEM) -> tuple[list[ChatFormat], list[str]]:
    """The formats of a tokenizer's chat template, the one without a system prompt first, and what has to be said.

    Args:
        tokenizer: one of transformers.
        systems: system prompts to try.
    """
    if not tokenizer.chat_template:
        return [], ["the tokenizer has no chat template, so there is no chat and no noise in its format"]
    found: list[ChatFormat] = []
    said = []
    for system in (None, *systems):
        name = "no system prompt" if system is None else f"system: {system}"
        asked = [{"role": "user", "content": SENTINEL}]
        messages = asked if system is None else [{"role": "system", "content": system}, *asked]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template raises what it likes
            said.append(f"{name}: the chat template refuses it ({' '.join(str(error).split()):.80})")
            continue
        if text.count(SENTINEL) != 1:
            said.append(f"{name}: the chat template does not hold the user's words once and as they are")
            continue
        before, after = text.split(SENTINEL)
        if any((known.before, known.after) == (before, after) for known in found):
            said.append(f"{name}: the chat template ignores it")
        else:
            found.append(ChatFormat(name, system, before, after))
    return found, said


def turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template puts behind an answer, if it does."""
    asked = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": SENTINEL}]
    try:
        _, found, rest = tokenizer.apply_chat_template(asked, tokenize=False).partition(SENTINEL)
    except Exception:  # no template, or one that raises: then the other ends are what there is
        return None
    return _first_special(tokenizer, rest) if found else None


def _first_special(tokenizer: Any, text: str) -> int | None:
    """The first token of a text, if it is a special one."""
    ids = tokenizer(text.strip(), add_special_tokens=False).input_ids if text.strip() else []
    return int(ids[0]) if ids and ids[0] in special_ids(tokenizer) else None


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Every special token: those with a name, and those that only templates know (Llama 3's end of a turn)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset({*tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)})
