"""With no method, or with strength 0 everywhere, the host's run is what it was, bit for bit."""

import pytest
from holdfast.methods import AGEM, L2SP, FullKL, TargetMaskedKL

import runs
import tiny

OFF = [TargetMaskedKL(strength=0), FullKL(strength=0), L2SP(strength=0), AGEM(strength=0)]
ON = [TargetMaskedKL(), L2SP(), AGEM()]


def model(kind, dropout=0.1):
    base = tiny.llama(attention_dropout=dropout)  # dropout: a stray random number would show
    return tiny.lora(base, lora_dropout=dropout) if kind == "lora" else base


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dense"])
@pytest.mark.parametrize("host", ["sft", "dpo", "trainer"])
def test_trainers(host, kind, checkpointing):
    options = {"gradient_checkpointing": checkpointing}
    alone = runs.train(host, None, model(kind), **options)
    assert runs.identical(runs.train(host, [], model(kind), **options).model, alone.model)
    assert runs.identical(runs.train(host, OFF, model(kind), **options).model, alone.model)
    # the control: the same comparison sees a method that is on
    assert not runs.identical(runs.train(host, ON, model(kind), **options).model, alone.model)


@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_plain_loop(kind):
    import torch

    def run(methods):
        torch.manual_seed(0)
        return runs.loop(methods, model(kind))[0]

    alone = run(None)
    assert runs.identical(run([]), alone)
    assert runs.identical(run(OFF), alone)
    assert not runs.identical(run(ON), alone)
