"""The host's loss and a method's from one pass over the head: nothing that a host shows is another than from two."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from holdfast.methods import AGEM, L2SP, FullKL, SelfReplay, TargetMaskedKL
from one_pass_runs import BAR, TMKL, assert_same, attached, moved, shown, trained
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

import families
import runs
import tiny

FULL = FullKL(strength=0.5)
BESIDE = [L2SP(strength=0.1), AGEM(), SelfReplay()]
SEVERAL = [FullKL(strength=0.5, positions="prompt"), TargetMaskedKL(gamma=1.0), *BESIDE]


# --- the same as today's path -----------------------------------------------------------------------------------------

CASES = {
    "sft": ("sft", [TMKL], {"gradient_accumulation_steps": 1}),
    "sft, full": ("sft", [FULL], {"gradient_accumulation_steps": 4}),
    "sft, packed": ("sft", [TMKL], {"packing": True, "max_length": 40}),
    "sft, every token": ("sft", [FULL], {"completion_only_loss": False}),
    "sft, several methods": ("sft", SEVERAL, {"gradient_checkpointing": True}),
    "sft, reverse": ("sft", [TargetMaskedKL(direction="reverse", exclusion=0.5)], {"gradient_accumulation_steps": 4}),
    "trainer": ("trainer", [TMKL], {"gradient_accumulation_steps": 1}),
    "trainer, several methods": ("trainer", SEVERAL, {"gradient_accumulation_steps": 4}),
    "trainer, local counts": ("trainer", [FULL], {"average_tokens_across_devices": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_metrics_and_weights_are_those_of_two_passes(case):
    host, methods, options = CASES[case]
    drops = {"attention_dropout": 0.1} if methods is SEVERAL else {}  # a stray random number would show
    one, two = (
        trained(host, methods, each, tiny.lora(tiny.llama(**drops), lora_dropout=0.1 if drops else 0.0), **options)
        for each in (True, False)
    )
    assert "One pass over the head" in one.holdfast.explain()
    assert "Two passes over the head" in two.holdfast.explain()
    assert_same(one, two)
    assert {"loss", "grad_norm"} <= shown(one)[0].keys()
    if host == "sft":
        assert {"entropy", "mean_token_accuracy", "num_tokens"} <= shown(one)[0].keys()
    assert max(entry.get(key, 0) for entry in shown(one) for key in entry if key.endswith("/divergence")) > 1e-3


@pytest.mark.parametrize("host", ["sft", "trainer"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_head(host, tied):
    """Its gradient comes from the pass, and the base's head is a frozen copy."""
    one, two = (
        trained(host, [TMKL], one_pass, tiny.llama(tie_word_embeddings=tied), learning_rate=0.05)
        for one_pass in (True, False)
    )
    assert "One pass" in one.holdfast.explain()
    assert_same(one, two)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert moved(one)[head].abs().max() > 1e-4


def test_a_model_that_does_not_take_the_count_of_the_step():
    """Then the host's loss is a mean of the micro-batch, which it divides by the micro-batches of the step."""

    def run(one_pass):
        made = attached("trainer", [TMKL], one_pass)
        made.model_accepts_loss_kwargs = False
        made.train()
        return made

    assert_same(run(True), run(False))


def test_autocast_to_bfloat16():
    """TRL rounds logits to bfloat16 there, and the pass does not: they agree to that rounding, and ours is nearer."""
    exact = trained("sft", [TMKL], one_pass=False, bf16=False)
    one, two = (trained("sft", [TMKL], one_pass, bf16=True) for one_pass in (True, False))
    assert "One pass" in one.holdfast.explain()
    for mine, theirs in zip(shown(one), shown(two), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-2, abs=1e-2)
    assert runs.difference(moved(one), moved(two)) <= 0.05
    first = [each.state.log_history[0] for each in (one, two, exact)]
    for key in ("loss", "entropy"):
        mine, theirs, truth = (entry[key] for entry in first)
        assert abs(mine - truth) <= abs(theirs - truth) + 1e-4


@pytest.mark.parametrize("host", ["sft", "trainer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits(host, dtype):
    one, two = (trained(host, [TMKL], each, tiny.lora(tiny.llama().to(dtype)), steps=2) for each in (True, False))
    assert "One pass" in one.holdfast.explain()
    for mine, theirs in zip(shown(one), shown(two), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("family", ["gemma2, soft-cap", "cohere, logit scale", "phi, head with bias", "gpt2"])
def test_heads_of_other_families(family):
    one, two = (
        trained("trainer", [TMKL], one_pass, families.build(family), steps=2, learning_rate=0.02)
        for one_pass in (True, False)
    )
    assert "One pass" in one.holdfast.explain()
    assert_same(one, two)


def test_evaluation_is_the_hosts_own():
    one, two = (trained("sft", [TMKL], each, eval_strategy="steps", eval_steps=1) for each in (True, False))
    assert sum("eval_loss" in entry for entry in shown(one)) == 3
    assert_same(one, two)
    alone = runs.trainer("sft", eval_strategy="steps").evaluate()
    ours = attached("sft", [TMKL], eval_strategy="steps").evaluate()
    for key in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert ours[key] == alone[key]  # bit for bit: nothing was in the way


def test_two_processes(tmp_path):
    """torchrun, gloo: in two processes one pass is two passes too, and a step is what it is in one process."""
    script = Path(__file__).parent / "one_pass_run.py"
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=600, env=environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
    for host in ("sft", "trainer"):
        one_of_two, two_of_two, one_of_one = (
            load_file(tmp_path / f"{host}{name}.safetensors") for name in ("2True", "2False", "1True")
        )
        for other in (two_of_two, one_of_one):
            assert one_of_two.keys() == other.keys()
            for key in ("loss", "divergence"):
                torch.testing.assert_close(one_of_two[key], other[key], rtol=BAR, atol=BAR)
            assert runs.difference(one_of_two, other) <= BAR


# --- what it saves ----------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts products with the head, and the rows of the tallest tensor of logits."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.work, self.tallest = vocab, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = args[-2:]
            if self.vocab in (*left.shape, *right.shape):
                self.work += left.shape[0] * left.shape[1] * right.shape[1]
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, torch.Tensor) and each.shape[-1:] == (self.vocab,) and not each.is_meta:
                self.tallest = max(self.tallest, each.numel() // self.vocab)
        return out


@pytest.mark.parametrize("host", ["sft", "trainer"])
def test_three_products_and_no_tensor_of_tokens_and_vocabulary(host):
    found = {}
    for one_pass in (True, False):
        made = attached(
            host, [TargetMaskedKL(chunk_rows=4)], one_pass, tiny.lora(tiny.llama(vocab_size=211)), steps=1,
            gradient_accumulation_steps=1, per_device_train_batch_size=8,
        )  # fmt: skip
        with Products(211) as found[one_pass]:
            made.train()
        tokens = made._counts.completion
    whole = tokens * 32 * 211
    assert found[True].work == 3 * whole
    assert found[False].work >= 5 * whole
    assert found[True].tallest == 32 < tokens < found[False].tallest  # 32: the head itself, transposed


def test_logits_cannot_be_read_and_are_there_again_afterwards():
    class Keeps(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **options):
            output = super().forward(input_ids, attention_mask, labels=labels, **options)
            seen.append(output.logits)
            return output

    seen = []
    made = attached("trainer", [TMKL], model=tiny.lora(Keeps(tiny.llama().config)), steps=1)
    seen.clear()
    made.train()
    assert seen[0].shape == (2, 10, 96)
    for read in (lambda x: x.argmax().item(), lambda x: x.tolist(), lambda x: x + torch.zeros(96).numpy()):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            read(seen[0])
    batch = tiny.batches(1)[0]
    assert made.model(**batch).logits.isfinite().all()
    model = made.model.get_base_model()
    assert "_loss_function" not in vars(model)
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("host", ["sft", "trainer"])
def test_who_asks_for_outputs_gets_logits(host):
    made = attached(host, [TMKL])
    made.current_gradient_accumulation_steps = 1  # the training loop sets it
    batch = tiny.batches(1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL's, of return_outputs
        loss, outputs = made.compute_loss(made.model.train(), dict(batch), return_outputs=True)
    assert outputs.logits.isfinite().all()
    made.holdfast.gradients_ready()
    torch.testing.assert_close(made.compute_loss(made.model.train(), dict(batch)), loss)


def test_an_error_in_the_pass_leaves_the_model_as_it_was(monkeypatch):
    made = attached("sft", [TMKL])
    before = vars(made.model.get_base_model())["forward"]
    monkeypatch.setattr(made._one_pass, "_both", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.train()
    model = made.model.get_base_model()
    assert vars(model)["forward"] is before
    assert "_loss_function" not in vars(model)
    assert "forward" not in vars(model.lm_head)
