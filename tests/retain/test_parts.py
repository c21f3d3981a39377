"""Formats, rows, prompts, and what is dropped: each by itself, against a slow way to say the same."""

from __future__ import annotations

import random

import pytest
from holdfast import lab
from holdfast.drift.driftcheck.near import likeness
from holdfast.drift.suite import suite
from holdfast.integrations.retain_data import to_batches
from holdfast.retain.drops import Sieve, broken, grams
from holdfast.retain.formats import chat_formats, special_ids, turn_end
from holdfast.retain.kept import PoolError
from holdfast.retain.prompts import built_in
from holdfast.retain.rows import prompt_ids, prompts, read_rows, sequences

from tiny import tokenizer

# as ChatML has it: a system prompt of its own where none is given
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_format_is_what_stands_before_and_after_the_users_words():
    tok = tokenizer()
    tok.chat_template = CHATML
    (plain, system), said = chat_formats(tok, ["Be good.", "Be brief."])
    assert plain.before == "<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\n"
    assert plain.after == "<|im_end|>\n<|im_start|>assistant\n"
    assert system.before == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert said == ["system: Be good.: the chat template ignores it"]  # it is what the template says anyway
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert system.render("Why?") == tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert plain.cut("Why? <|im_end|>\n<|im_start|>assistant\nSo.") == "Why?"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}", "once and as they are"),
        ("{% for m in messages %}{{ m['content'] | lower }}{% endfor %}", "once and as they are"),
        ("{{ raise_exception('no') }}", "refuses it (no)"),
    ],
)
def test_a_template_without_a_format_is_told(template, why):
    tok = tokenizer()
    tok.chat_template = template
    found, said = chat_formats(tok, [])
    assert not found
    assert why in said[0]


def test_the_end_of_a_turn_is_the_templates():
    assert turn_end(tokenizer()) == 1
    tok = tokenizer()
    tok.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tok.chat_template = CHATML
    assert turn_end(tok) == tok.convert_tokens_to_ids("<|im_end|>")
    assert {0, 1, 2, turn_end(tok)} <= special_ids(tok)
    tok.chat_template = None
    assert turn_end(tok) is None


def test_near_duplicates_are_those_of_the_plain_definition():
    rng = random.Random(0)
    texts = [[rng.randrange(6, 90) for _ in range(rng.randint(2, 60))] for _ in range(60)]
    for row in list(texts):  # twins with one to four other tokens
        twin = list(row)
        for _ in range(rng.randint(1, 4)):
            twin[rng.randrange(len(twin))] = rng.randrange(6, 90)
        texts.append(twin)
    texts += [[*row, 5] for row in texts[:40]]
    rng.shuffle(texts)
    sieve, kept, why = Sieve(), [], {"near duplicate": 0, "duplicate": 0, None: 0}
    for row in texts:
        sets = [(grams(row), grams(other)) for other in kept]
        alike = any(10 * len(a & b) >= 9 * len(a | b) for a, b in sets)
        expected = "duplicate" if row in kept else "near duplicate" if alike else None
        assert sieve.seen(row) == expected
        why[expected] += 1
        if expected is None:
            kept.append(row)
    assert why["near duplicate"] > 10
    assert why[None] > 60


def test_loops_are_found_and_lists_are_not():
    rng = random.Random(0)
    plain = [rng.randrange(90) for _ in range(60)]
    assert broken(plain) is None
    assert broken([]) is None
    assert broken([7] * 3) is None
    assert broken([*plain[:20], *[5, 6, 7, 8] * 6]) == "loop"
    assert broken([*plain, *[5, 6, 7, 8] * 6]) is None  # the smaller part of a long text
    assert broken([*plain[:10], *[3] * 12]) == "one token"
    assert broken([*[1, 2, 3] * 3, *plain]) is None


def test_rows_are_tokenised_as_training_does_it():
    _, tok = lab.load("lab-aligned")
    user, answer = [{"role": "user", "content": "Copy: b c"}], [{"role": "assistant", "content": "b c"}]
    rows = [
        {"text": "The kite was safe."},
        {"messages": [*user, *answer]},
        {"prompt": user, "completion": answer},
        {"prompt": "What is 2", "completion": " + 3?"},
        {"prompt": user, "chosen": answer, "rejected": user},
        {"chosen": [*user, *answer], "rejected": user},
    ]
    made = sequences(rows, tok, source="mine")
    for row, kept in zip(rows, made, strict=True):
        if "chosen" in row:
            row = {"prompt": user, "completion": answer} if "prompt" in row else {"messages": row["chosen"]}
        (batch,) = to_batches([row], tok)
        assert list(kept.input_ids) == batch["input_ids"][0].tolist()
        assert (kept.kind, kept.source) == ("own", "mine")
        if "completion" in row:
            assert kept.prompt_tokens == (batch["labels"][0] == -100).sum()
    said = [{"from": "human", "value": "Copy: b c"}, {"from": "gpt", "value": "b c"}]
    assert sequences([{"conversations": said}], tok)[0].input_ids == made[1].input_ids
    assert sequences([{"text": "The kite was safe."}], tok, max_length=3)[0].input_ids == made[0].input_ids[:3]


def test_every_row_that_cannot_be_kept_is_told(tmp_path):
    tok = tokenizer()
    tok.chat_template = None
    rows = [{"text": "w1 w2"}, {"words": "w1"}, {"messages": [{"role": "user", "content": "w1"}]}, {"text": ""}, {}]
    with pytest.raises(PoolError) as raised:
        sequences(rows, tok)
    told = raised.value.faults
    assert [fault.split(":")[0] for fault in told] == ["row 2", "row 3", "row 4", "row 5"]
    assert "it has the keys words" in told[0]
    assert "no chat template" in told[1]
    assert "it has 1 tokens" in told[2]
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\nnonsense\n[1]\n')
    with pytest.raises(PoolError) as raised:
        read_rows(path)
    assert [fault.split(":")[0] for fault in raised.value.faults] == ["line 3", "line 4"]
    path.write_text('{"text": "a\u2028b"}\n')
    assert read_rows(path) == [{"text": "a\u2028b"}]
    for empty in ("", "\n"):
        path.write_text(empty)
        with pytest.raises(PoolError, match="it is empty"):
            read_rows(path)
    with pytest.raises(PoolError, match="cannot be read"):
        read_rows(tmp_path / "nowhere")


def test_the_prompts_of_rows():
    user, answer = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}
    rows = [{"prompt": "w1", "completion": "w2"}, {"prompt": [user]}, {"messages": [user, answer, user, answer]}]
    found = prompts(rows)
    assert found == ["w1", [user], [user, answer, user]]
    tok = tokenizer()
    assert tok.decode(prompt_ids(found[0], tok)) == "<u> w1 <a>"
    assert tok.decode(prompt_ids(found[2], tok)) == "<u> w1 <a> w2 <eos> <u> w1 <a>"
    with pytest.raises(PoolError) as raised:
        prompts([{"text": "w1"}, {"prompt": "w1"}, {"messages": [answer]}])
    assert len(raised.value.faults) == 2


def test_the_built_in_prompts_are_many_and_not_those_that_measure():
    found = built_in()
    assert len(found) >= 300
    assert len({prompt.text for prompt in found}) == len(found)
    kinds = {"facts", "writing", "code", "maths", "advice", "text tasks", "languages", "talk", "refusable"}
    assert {prompt.kind for prompt in found} == kinds
    assert min(sum(prompt.kind == kind for prompt in found) for kind in kinds) >= 20
    core = [prompt.text for prompt in suite("core").prompts]
    assert max(likeness(prompt.text, other) for prompt in found for other in core) < 0.5
