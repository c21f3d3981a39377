"""What a pool covers, counted again by hand; perplexities against one forward of each sequence in float64."""

from __future__ import annotations

import json
import math

import pytest
import torch
from holdfast.core.digest import base_digest, tokenizer_digest
from holdfast.retain.coverage import coverage, log_likelihoods
from holdfast.retain.kept import Kept, PoolError, id_of
from holdfast.retain.pool import Pool

from tiny import llama, lora, shake, tokenizer


def pool_of(rows):
    tok = tokenizer()
    made = [Kept(id_of(ids), kind, source, tok.decode(ids), tuple(ids), 0) for kind, source, ids in rows]
    of = {"tokenizer": {"sha256": tokenizer_digest(tok)}, "base": {"sha256": base_digest(llama())}}
    return Pool((), of).add(made)


ROWS = [
    ("text", "start token", [1, 10, 11, 10, 11]),
    ("text", "start token", [1, 10, 12]),
    ("own", "a.jsonl", [20, 21, 22, 23, 24, 25]),
    ("own", "b.jsonl", [20, 21]),
]


def test_counts_lengths_and_diversity():
    text, own, whole = coverage(pool_of(ROWS), examples=1).parts
    assert (text.kind, text.count, text.share, text.mean_tokens) == ("text", 2, 0.5, 4.0)
    assert text.distinct == (4 / 8, 4 / 6, 4 / 4)  # pairs: 1-10 twice, 10-11 twice, 11-10, 10-12
    assert own.sources == {"a.jsonl": 1, "b.jsonl": 1}
    assert own.distinct == (6 / 8, 5 / 6, 4 / 4)
    assert (whole.kind, whole.count, whole.mean_tokens, whole.perplexity) == ("all", 4, 4.0, None)
    assert text.examples == ("<eos> w5 w6 w5 w6",)


def test_perplexity_is_the_bases():
    pool = pool_of(ROWS)
    model = lora(llama())
    shake(model)
    found = log_likelihoods(pool, model, batch_size=3)
    base = llama().double()
    for kept in pool:
        ids = torch.tensor([kept.input_ids])
        logs = base(input_ids=ids).logits[0, :-1].log_softmax(-1)
        expected = sum(logs[i, token].item() for i, token in enumerate(kept.input_ids[1:]))
        assert found[kept.id] == pytest.approx(expected, rel=1e-5)
    parts = coverage(pool, model=model).parts
    assert parts[-1].perplexity == pytest.approx(math.exp(-sum(found.values()) / (16 - 4)))


def test_what_a_pool_touches():
    told = coverage(
        pool_of(ROWS), probes=["w16 w17 w18", "w16 w17 w18 w5", "w15 w16", "w60 w61 w62"], tokenizer=tokenizer()
    )
    whole, half, short, none = told.touches
    assert (whole.overlap, whole.anywhere, whole.text) == (1.0, 1.0, "w15 w16 w17 w18 w19 w20")
    assert (half.overlap, half.id) == (0.5, whole.id)
    assert short.overlap == 1.0
    assert (none.overlap, none.anywhere, none.id, none.text) == (0.0, 0.0, "", "")
    spread = coverage(pool_of(ROWS), probes=["w5 w6 w5", "w5 w6 w5 w16"], tokenizer=tokenizer()).touches
    assert [touch.overlap for touch in spread] == [1.0, 0.5]
    assert json.loads(json.dumps(told.as_dict()))["touches"][0]["overlap"] == 1.0


def test_a_probe_may_be_spread_over_sequences():
    rows = [("own", "a", [20, 21, 22, 5]), ("own", "a", [6, 21, 22, 23])]
    (touch,) = coverage(pool_of(rows), probes=["w15 w16 w17 w18"], tokenizer=tokenizer()).touches
    assert (touch.overlap, touch.anywhere) == (0.5, 1.0)


def test_what_cannot_be_told():
    with pytest.raises(PoolError) as raised:
        coverage(Pool(()), probes=["w1"])
    assert len(raised.value.faults) == 2
    with pytest.raises(PoolError, match="'' has no tokens"):
        coverage(pool_of(ROWS), probes=[""], tokenizer=tokenizer())
    with pytest.raises(PoolError, match="other weights"):
        coverage(pool_of(ROWS), model=llama(seed=1))
