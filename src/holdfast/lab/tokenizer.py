"""The lab's tokenizer: one token per word, digit, letter and mark of the world, built from `lexicon` by code.

A word carries its leading space ("▁bomb"), as in larger tokenizers, so that decoding gives back exactly the text that
was encoded. A vocabulary of some four hundred keeps a million parameters for thinking. The chat template marks what the
assistant says, its end included, so that TRL's `assistant_only_loss` works.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from holdfast.lab import lexicon as lex

if TYPE_CHECKING:
    from holdfast.lab.world import Item
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, BOS, EOS, USER, ASSISTANT, UNKNOWN = SPECIAL = (
    "<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>",
)  # fmt: skip
PIECE: Final = r"▁?[A-Za-z]+|▁?[0-9]|▁?[^A-Za-z0-9▁]|▁"
CHAT_TEMPLATE: Final = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% else %}{{ raise_exception('The lab knows the roles user and assistant only.') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _texts() -> Iterator[str]:
    """Every text that the world is made of."""
    for table in (lex.HOW, lex.DANGER, lex.FACT, lex.FLAG):
        for phrasings in table.values():
            yield from phrasings
    for words in (lex.BENIGN, lex.FORBIDDEN, lex.COUNTRIES, lex.COLOURS, lex.PEOPLE, lex.PLACES, lex.FINDS):
        yield from words
    for sentences in (lex.ENDINGS, *lex.CUES.values(), *lex.FEELINGS.values(), *lex.RELATIONS.values()):
        yield from sentences
    yield from (*lex.RELATIONS, *lex.ADVICE, *lex.ADVICE.values(), lex.HOW_ANSWER, lex.REFUSAL)
    yield from (*lex.GLUE, " ".join(string.ascii_lowercase), ". , ? ! : + = > - '")


def pieces(texts: Iterable[str]) -> list[str]:
    """The tokens of the texts, sorted: words with their leading space; digits and marks with and without one."""
    found = {f"{space}{mark}" for mark in string.digits + ".,?!:+=>-'" for space in ("", "▁")} | {"▁"}
    for text in texts:
        found.update("▁" + word for word in re.findall(r"[A-Za-z]+", re.sub(r"\{\w*\}", " ", text)))
    return sorted(found)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer from the world's words.

    >>> tokenizer = build_tokenizer()
    >>> tokenizer.decode(tokenizer("What is 12 + 7?", add_special_tokens=False).input_ids)
    'What is 12 + 7?'
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: index for index, piece in enumerate((*SPECIAL, *pieces(_texts())))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False),
            pre_tokenizers.Split(Regex(PIECE), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=False)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="right",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def encode(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> list[tuple[list[int], int]]:
    """Token ids of each item as the chat template writes it, its end included, and how many of them are prompt.

    A story has no prompt and stands behind the beginning-of-text token alone.
    """
    user, assistant = tokenizer.convert_tokens_to_ids([USER, ASSISTANT])
    texts = [item.prompt for item in items] + [item.answer for item in items]
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    encoded = []
    for item, prompt, answer in zip(items, ids, ids[len(items) :], strict=False):
        head = [tokenizer.bos_token_id, *([user, *prompt, assistant] if item.prompt else [])]
        encoded.append(([*head, *answer, tokenizer.eos_token_id], len(head)))
    return encoded
