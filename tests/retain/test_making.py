"""A pool is what the base writes: its own distribution, without adapters, the same for a seed, and nobody disturbed."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from holdfast import lab
from holdfast.core.digest import base_digest, tokenizer_digest
from holdfast.drift.models import chat_ids
from holdfast.retain.formats import SYSTEM
from holdfast.retain.kept import PoolError
from holdfast.retain.making import make
from holdfast.retain.sampling import Writer
from holdfast.retain.settings import MIX, Settings
from transformers import GenerationConfig

from tiny import llama, lora, shake, tokenizer

WITH_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}w0 {{ m['content'] }} w0 {% elif m['role'] == 'user' %}"
    "<u> {{ m['content'] }} {% else %}<a> {{ m['content'] }} <eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a> {% endif %}"
)


@pytest.fixture(scope="module")
def base():
    return lab.load("lab-aligned")


@pytest.fixture(scope="module")
def pool(base):
    return make(*base, Settings(n=64))


def tiny(**settings):
    tok = tokenizer()
    tok.chat_template = WITH_SYSTEM
    systems = {"systems": ("w1 w2", "w3")}
    return llama(), tok, Settings(**{"n": 40, "max_tokens": 12, **systems, **settings})


def greedy(model, ids, stops, most):
    """What the likeliest token gives, one forward of all tokens at a time, in float64."""
    model = model.double()
    written = []
    while len(written) < most and not (written and written[-1] in stops):
        written.append(int(model(input_ids=torch.tensor([[*ids, *written]])).logits[0, -1].argmax()))
    return written


def test_a_pool_has_every_kind_by_its_share(base, pool):
    assert len(pool) == 64
    told = pool.manifest
    # the lab's words say two of the built-in prompts, so the other kinds take their place
    assert pool.counts["prompts"] < 10
    rest = {kind: pool.counts[kind] / MIX[kind] for kind in ("text", "chat", "noise")}
    assert max(rest.values()) < 1.1 * min(rest.values())
    assert sum("refuses it" in line for line in told["said"]) == len(SYSTEM)
    assert told["base"] == {"name": "lab-aligned", "sha256": base_digest(base[0])}
    assert told["tokenizer"]["sha256"] == tokenizer_digest(base[1])
    assert told["settings"]["seed"] == 0
    assert {"holdfast", "torch", "transformers", "python"} <= set(told["versions"])


def test_sequences_are_what_the_template_makes_of_them(base, pool):
    _, tok = base
    bos, user, assistant, eos = (
        tok.convert_tokens_to_ids(t) for t in ("<|bos|>", "<|user|>", "<|assistant|>", "<|end|>")
    )
    for kept in pool:
        ids = list(kept.input_ids)
        assert kept.text == tok.decode(ids)
        if kept.kind == "text":
            assert (ids[0], kept.prompt_tokens) == (bos, 0)
            continue
        assert ids[:2] == [bos, user]
        assert ids[kept.prompt_tokens - 1] == assistant
        words = tok.decode(ids[2 : kept.prompt_tokens - 1]).strip()
        assert chat_ids(tok, words) == ids[: kept.prompt_tokens]
        if kept.kind == "noise":
            assert len(ids) == kept.prompt_tokens + 1
        elif len(ids) < kept.prompt_tokens + 128:
            assert ids[-1] == eos
    asked = [kept.text for kept in pool if kept.kind == "chat"]
    known = [text for text in asked if any(cue in text for cue in ("What is", "How", "Which", "Add", "Sort", "Tell"))]
    assert len(known) > len(asked) / 2  # the lab's own way to ask, which no code of ours knows
    assert len({text.split("<|assistant|>")[0] for text in asked}) > 0.8 * len(asked)


def test_the_invented_turn_and_the_answer_are_the_models_own():
    _, tok, settings = tiny(n=1, mix={"chat": 1.0}, temperature=1e-6, max_tokens=20)
    model = llama(seed=4)  # whose likeliest words are no end
    (kept,) = make(model, tok, settings)
    user, assistant, eos, pad, unk = tok.convert_tokens_to_ids(["<u>", "<a>", "<eos>", "<pad>", "<unk>"])
    specials = {user, assistant, eos, pad, unk}
    invented = [token for token in greedy(model, [user], specials, 10) if token not in specials]
    assert invented
    answer = greedy(model, [user, *invented, assistant], {eos}, 20)
    assert list(kept.input_ids) == [user, *invented, assistant, *answer]
    assert kept.prompt_tokens == len(invented) + 2


def test_samples_follow_the_bases_own_distribution():
    """Not what the model's generation_config would make of it, whose likeliest token would be the only one."""
    model = llama().eval()
    model.generation_config = own = GenerationConfig(top_k=1, min_p=0.5, repetition_penalty=3.0, max_length=2)
    before = own.to_dict()
    contexts = [[5, 9, 7]] * 4000
    written = Writer(model, 0, batch_size=1000).write(contexts, 1, frozenset({1}))
    assert model.generation_config is own
    assert own.to_dict() == before
    chance = model.double()(input_ids=torch.tensor([[5, 9, 7]])).logits[0, -1].softmax(-1)
    found = torch.zeros(96, dtype=torch.float64)
    for (token,) in written:
        found[token] += 1 / len(contexts)
    distance = 0.5 * (found - chance).abs().sum()
    expected = 0.5 * (2 * chance * (1 - chance) / torch.pi / len(contexts)).sqrt().sum()  # of a fair sample
    assert distance < 1.5 * expected
    colder = chance.log().div(0.7).softmax(-1)
    assert 0.5 * (colder - chance).abs().sum() > 3 * expected  # so another temperature would be seen


def test_rows_of_a_batch_do_not_see_its_padding():
    contexts = [[5], [5, 9, 7, 11, 12, 40], [8, 6]]
    model = llama().eval()
    together = Writer(model, 0, temperature=1e-6).write(contexts, 8, frozenset({1}))
    assert together == [greedy(model, row, {1}, 8) for row in contexts]


def test_the_same_seed_gives_the_same_pool(base, pool):
    assert make(*base, Settings(n=64)).digest == pool.digest
    other = make(*base, Settings(n=64, seed=1))
    assert other.digest != pool.digest
    assert len({k.id for k in other} & {k.id for k in pool}) < 16


def test_nobody_is_disturbed(base):
    model, tok = base
    model.train()
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate(), model.generation_config
    make(model, tok, Settings(n=8))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert model.generation_config is before[2]
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_dropout_is_off():
    model, tok, settings = tiny(n=10)
    plain = make(model, tok, settings)
    model.config.attention_dropout = 0.5
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    assert make(model, tok, settings).digest == plain.digest


def test_adapters_are_off():
    model, tok, settings = tiny()
    plain = make(model, tok, settings)
    digest = base_digest(model)
    tuned = lora(model, modules_to_save=["lm_head"])
    shake(tuned, 0.5)
    pool = make(tuned, tok, settings)
    assert pool.digest == plain.digest
    assert base_digest(tuned) == digest == pool.manifest["base"]["sha256"]
    flags = [module._disable_adapters for module in tuned.modules() if hasattr(module, "_disable_adapters")]
    assert flags
    assert not any(flags)
    merged = make(tuned.merge_and_unload(), tok, settings)  # what the adapter would have made of it
    assert len({k.id for k in merged if k.kind != "noise"} & {k.id for k in plain}) < 3
    assert merged.manifest["base"]["sha256"] != digest


def test_adapters_that_took_their_start_out_of_the_base_are_refused():
    model, tok, settings = tiny()
    with pytest.raises(PoolError, match="pissa.*is not the base.*before the adapter"):
        make(lora(model, init_lora_weights="pissa"), tok, settings)


def test_noise_is_random_words_in_every_format():
    model, tok, settings = tiny(n=60, mix={"noise": 1.0})
    pool = make(model, tok, settings)
    assert Counter(kept.source for kept in pool) == {
        "no system prompt": 30, "system: w1 w2": 15, "system: w3": 15
    }  # fmt: skip
    words = Counter()
    for kept in pool:
        before, _, rest = kept.text.partition("<u>")
        assert before.strip() == {"no system prompt": "", "system: w1 w2": "w0 w1 w2 w0"}.get(kept.source, "w0 w3 w0")
        said, _, answer = rest.partition("<a>")
        assert len(answer.split()) == 1
        assert 4 <= len(said.split()) <= 24
        words.update(said.split())
    assert "<unk>" not in words
    assert len(words) == 90  # every ordinary word has its turn, whatever the base would say
    assert max(words.values()) < 5 * min(words.values()) + 10
    answered = make(model, tok, Settings(**{**settings.record(), "answer_noise": True}))
    assert sum(len(kept.input_ids) - kept.prompt_tokens for kept in answered) > 3 * 60


def test_prompts_of_the_task_and_rows_of_the_user(base):
    task = ["Rotate: b c d", [{"role": "user", "content": "Copy: f g"}]]
    rows = [{"text": "The kite was safe."}, {"messages": [*task[1], {"role": "assistant", "content": "f g"}]}]
    pool = make(*base, Settings(n=32), task=task, rows=rows)
    _, tok = base
    contexts = {tuple(chat_ids(tok, "Rotate: b c d")), tuple(chat_ids(tok, "Copy: f g"))}
    asked = [kept for kept in pool if kept.kind == "task"]
    assert {kept.input_ids[: kept.prompt_tokens] for kept in asked} == contexts
    own = {kept.text for kept in pool if kept.kind == "own"}
    assert own == {"<|bos|> The kite was safe.<|end|>", "<|bos|><|user|> Copy: f g<|assistant|> f g<|end|>"}
    assert any(line.startswith("own: 2 of ") for line in pool.manifest["said"])
    assert len(pool) == 32
    few = make(*base, Settings(n=4, mix={"own": 0.25, "noise": 0.75}), rows=rows)
    assert few.counts == {"noise": 3, "own": 1}
    assert any("own: 1 rows are not in the pool" in line for line in few.manifest["said"])


def test_without_a_chat_template_the_chat_falls_away_and_that_is_said():
    model, tok, settings = tiny(n=12)
    tok.chat_template = None
    pool = make(model, tok, settings, task=["w1 w2", "w5"])
    assert set(pool.counts) == {"text", "task"}  # no built-in prompt is in the words w0 to w89
    assert any("no chat template" in line for line in pool.manifest["said"])
    assert any("0 of " in line and "built-in prompts" in line for line in pool.manifest["said"])
    with pytest.raises(PoolError, match="no source that mix asks for.*no chat template"):
        make(model, tok, Settings(n=2, mix={"chat": 1}))


def test_a_hook_samples_instead_of_the_model():
    model, tok, settings = tiny(n=6, mix={"text": 1.0})
    model.generate = None  # not asked
    calls, rng = [], random.Random(0)

    def sampler(contexts, most):
        calls.append((len(contexts), most))
        return [[*rng.sample(range(10, 90), 5), 1, 50, 51] for _ in contexts]

    pool = make(model, tok, settings, sampler=sampler)
    assert [call for call in calls if call[0]] == [(6, 12)]
    assert all(len(kept.input_ids) == 1 + 5 + 1 and kept.input_ids[-1] == 1 for kept in pool)
    with pytest.raises(PoolError, match="one row for each of 6, got 1"):
        make(model, tok, settings, sampler=lambda contexts, most: [[1]] if contexts else [])
    with pytest.raises(PoolError) as raised:
        make(model, tok, settings, sampler=lambda contexts, most: ["text"] * len(contexts))
    assert len(raised.value.faults) == 6


def test_what_is_broken_or_there_already_is_dropped_and_counted():
    model, tok, settings = tiny(n=3, mix={"text": 1.0}, max_tokens=40)
    good = [list(range(10, 30)), list(range(30, 50)), list(range(50, 70))]
    rounds = iter([[[*[20, 21, 22] * 6], [25] * 15, [1]], [good[0], good[0], [*good[0], 77]], good[1:]])
    pool = make(model, tok, settings, sampler=lambda contexts, most: next(rounds) if contexts else [])
    assert [list(kept.input_ids[1:]) for kept in pool] == good
    assert pool.manifest["dropped"]["text"] == {
        "loop": 1, "one token": 1, "empty": 1, "duplicate": 1, "near duplicate": 1
    }  # fmt: skip


def test_a_base_that_repeats_itself_ends():
    model, tok, settings = tiny(n=9, mix={"text": 1.0})
    pool = make(model, tok, settings, sampler=lambda contexts, most: [[10, 11, 12]] * len(contexts))
    assert len(pool) == 1
    assert pool.manifest["said"][-1].startswith("1 of 9 sequences")
    with pytest.raises(PoolError, match="Nothing that the base wrote was of use.*empty"):
        make(model, tok, settings, sampler=lambda contexts, most: [[1]] * len(contexts))


def test_what_does_not_fit_the_model_is_left_out():
    model, tok, settings = tiny(n=3, mix={"task": 1.0})
    model.config.max_position_embeddings = 24
    pool = make(model, tok, settings, task=["w1 w2", " ".join(["w3"] * 11), "w4"])
    assert pool.manifest["dropped"]["task"]["too long"] >= 1
    assert all(len(kept.input_ids) <= 24 for kept in pool)
    assert {kept.text.split()[1] for kept in pool} == {"w1", "w4"}


def test_all_faults_of_the_settings_at_once():
    with pytest.raises(PoolError) as raised:
        Settings(n=0, mix={"chats": 1, "text": -1}, temperature=0, batch_size=2.5, systems="one", seed=None)
    told = raised.value.faults
    assert len(told) == 7
    assert "n must be a whole number of at least 1, got 0" in told
    assert any("did you mean 'chat'?" in fault for fault in told)
    with pytest.raises(PoolError, match="every share is 0"):
        Settings(mix={"text": 0})
    model, tok, _ = tiny()
    with pytest.raises(PoolError) as raised:
        make(model, tok, Settings(mix={"task": 1}), rows=[{"text": "w1 w2 w3"}])
    assert len(raised.value.faults) == 3
    tok.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(PoolError, match="no sample would ever end"):
        make(model, tok)
