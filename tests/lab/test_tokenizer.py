"""The tokenizer gives back what it was given, and marks what the assistant says."""

from itertools import islice

import pytest
from holdfast import lab
from holdfast.lab import lexicon, tasks, world
from holdfast.lab.tokenizer import build_tokenizer, encode

MIX = {**world.PRETRAINING, **world.ALIGNMENT, **{part: 0.1 for name in tasks.TASKS for part in tasks.parts(name)}}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize("split", lexicon.SPLITS)
def test_round_trip(tokenizer, split):
    for item in islice(world.stream(MIX, 5, split), 1500):
        for text in (item.prompt, item.answer):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", lab.NAMES)
def test_shipped_tokenizer_is_the_built_one(tokenizer, name):
    from transformers import AutoTokenizer

    shipped = AutoTokenizer.from_pretrained(lab.path(name))
    assert shipped.get_vocab() == tokenizer.get_vocab()
    assert shipped.chat_template == tokenizer.chat_template
    text = "What is 12 + 7?"
    assert shipped(text).input_ids == tokenizer(text).input_ids
    assert shipped.decode(shipped(text).input_ids, skip_special_tokens=True) == text


def test_chat_template_masks_answers_with_their_end(tokenizer):
    conversation = [
        {"role": "user", "content": "Reverse: b c d"},
        {"role": "assistant", "content": "d c b"},
        {"role": "user", "content": "What is 4 + 5?"},
        {"role": "assistant", "content": "9"},
    ]
    encoded = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, kept in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if kept]
    assert tokenizer.decode(said) == "d c b<|end|> 9<|end|>"


def test_encode_is_the_chat_template(tokenizer):
    items = list(islice(world.stream({**MIX}, 7), 200))
    for item, (ids, prompt) in zip(items, encode(tokenizer, items), strict=True):
        if item.prompt:
            chat = [*tasks.user(item.prompt), *tasks.assistant(item.answer)]
            assert ids == tokenizer.apply_chat_template(chat)["input_ids"]
            opening = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
            assert ids[:prompt] == opening
        else:
            assert ids == [*tokenizer(item.answer).input_ids, tokenizer.eos_token_id]


def test_retain_text_tokenizes_to_the_chat(tokenizer):
    chats = {e["text"] for e in lab.retain(50) if "<|user|>" in e["text"]}
    for text in chats:
        user, assistant = text.removeprefix("<|user|>").removesuffix("<|end|>").split("<|assistant|>")
        chat = [*tasks.user(user), *tasks.assistant(assistant)]
        assert tokenizer(text).input_ids == tokenizer.apply_chat_template(chat)["input_ids"]


def test_unknown_roles_are_refused(tokenizer):
    with pytest.raises(Exception, match="roles user and assistant only"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}])
