"""The host's loss and a method's from one pass over the head: nothing that a host shows is another than from two."""

import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from holdfast.methods import AGEM, L2SP, FullKL, SelfReplay, TargetMaskedKL
from one_pass_runs import BAR, TMKL, Waits, assert_close, assert_same, attached, moved, shown, trained
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

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
    assert_close(one, two, rel=2e-2, absolute=1e-2)
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
    assert_close(one, two, rel=1e-2, absolute=1e-3)


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


def processes(number, tmp_path, *options):
    """torchrun, gloo."""
    script = Path(__file__).parent / "one_pass_run.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path), *options],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def assert_same_files(tmp_path, mine, theirs):
    mine, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in (mine, theirs))
    assert mine.keys() == theirs.keys()
    for key in ("loss", "divergence"):
        torch.testing.assert_close(mine[key], theirs[key], rtol=BAR, atol=BAR)
    assert runs.difference(mine, theirs) <= BAR


def test_two_processes(tmp_path):
    """In two processes one pass is two passes too, and a step is what it is in one process."""
    for number in (1, 2):
        processes(number, tmp_path, "alike")
    for host in ("sft", "trainer"):
        assert_same_files(tmp_path, f"{host}2True", f"{host}2False")
        assert_same_files(tmp_path, f"{host}2True", f"{host}1True")


def test_two_processes_that_choose_differently(tmp_path):
    """A hook on the main process alone, as wandb.watch sets it, and labels of its own on the other: nobody waits."""
    processes(2, tmp_path, "apart")
    assert_same_files(tmp_path, "apartTrue", "apartFalse")


# --- what a model does in training alone ------------------------------------------------------------------------------

CHANGES = {
    "nothing": lambda x: x,
    "half": lambda x: 0.5 * x,
    "dropout": lambda x: F.dropout(x, 0.2),
    "cut off": lambda x: x.detach(),
}


class Between(LlamaForCausalLM):
    """Changes what enters its head, in training alone; or makes its loss by itself, as Liger's patches do."""

    does = "nothing"

    def forward(self, input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None, **options):
        hidden = self.model(input_ids, attention_mask, use_cache=False).last_hidden_state
        change = CHANGES.get(self.does) if self.training else None
        if self.training and self.does == "own loss":
            logits = hidden[:, :-1] @ self.lm_head.weight.T
            nll = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            return CausalLMOutputWithPast(loss=nll / num_items_in_batch)
        logits = self.lm_head(hidden if change is None else change(hidden))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def between(does):
    model = Between(tiny.llama().config)
    model.does = does
    return tiny.lora(model)


@pytest.mark.parametrize("does", ["nothing", "half", "dropout", "cut off", "a hook"])
@pytest.mark.parametrize("host", ["sft", "trainer"])
def test_what_enters_the_head_is_the_hosts_affair(host, does):
    """TRL's own forward asks no head, so what happens before the head is nothing there."""

    def run(one_pass):
        torch.manual_seed(0)
        made = attached(host, [TMKL], one_pass, between(does))
        tiny.shake(made.model)  # where the host's loss is cut off, the method's has a gradient all the same
        made.start = tiny.trained(made.model)
        if does == "a hook":
            head = made.model.get_base_model().lm_head
            head.register_forward_pre_hook(lambda module, args: (2.0 * args[0],) if module.training else None)
        made.train()
        return made

    changed = host == "trainer" and does != "nothing"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        one = run(True)
    line = "what enters the head is not what the backbone returned"
    assert sum(line in str(each.message) for each in told) == changed
    assert (line in one.holdfast.explain()) == changed
    assert_same(one, run(False))


def test_a_forward_that_goes_round_its_head_in_training_is_told():
    """Liger's patch of a class cannot be seen on the trainer, and in evaluation it is the model's own forward."""
    one, two = (
        attached("trainer", [TMKL], model=between("own loss")),
        attached("trainer", [TMKL], False, between("own loss")),
    )
    assert "One pass over the head" in one.holdfast.explain()
    with pytest.warns(UserWarning, match="takes two passes over the head: in training the model's forward"):
        one.train()
    two.train()
    assert "One pass over the head" not in one.holdfast.explain()
    assert (
        "Two passes over the head, one for the host's loss and one for a method's: in training"
        in one.holdfast.explain()
    )
    assert_same(one, two)


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


class Statistics(TorchDispatchMode):
    """Counts what only statistics of rows ask of the vocabulary."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.argmax, torch.ops.aten.special_entr)
        return func(*args, **(kwargs or {}))


def test_who_reads_no_statistics_pays_for_none():
    counts = {}
    for host in ("sft", "trainer"):
        made = attached(host, [TMKL], steps=1)
        with Statistics() as found:
            made.train()
        counts[host] = found.count
    assert counts["sft"] >= 4  # two micro-batches
    assert counts["trainer"] == 0


@pytest.mark.parametrize("host", ["sft", "trainer"])
def test_nothing_waits_for_the_device_in_a_micro_batch(host):
    """But the check in backward, on a CPU, and the engine's plain twin, which asks how many rows there are."""
    made = attached(host, [TMKL], steps=2, gradient_accumulation_steps=4, logging_steps=2)
    per_step = []
    read = made._one_pass._labels.read
    made._one_pass._labels.read = lambda *args: (per_step.append(1), read(*args))
    with Waits() as waits:
        made.train()
    assert len(per_step) == 2
    engine, log = ("chunked", "closed_form", "divergence"), "metrics"
    seen = Counter(name for name in waits.seen if not name.startswith((*engine, log)))
    assert seen == {
        "types.of": 2,  # the session's count of a step's tokens
        "one_pass_labels.read": 4,  # the labels of a step, and the host's count of its tokens
        "one_pass_parts.backward": 8,
        "one_pass._weight": 8,  # of a tensor that is on the CPU everywhere
    }


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


class Fails(RuntimeError):
    pass


@pytest.mark.parametrize("host", ["sft", "trainer"])
def test_an_error_in_the_pass_leaves_all_as_it_was(host, monkeypatch):
    """The model, and the session, which holds no tensor of the step and reads none of it in the next."""

    def fail(*args, **options):
        raise Fails

    made = attached(host, [TMKL], gradient_accumulation_steps=1)
    tiny.shake(made.model, 0.4)
    before = vars(made.model.get_base_model()).get("forward")
    with monkeypatch.context() as patched:
        patched.setattr("holdfast.integrations.one_pass.linear_cross_entropy_with_divergence", fail)
        with pytest.raises(Fails):
            made.train()
    model, session = made.model.get_base_model(), made.holdfast
    assert vars(model).get("forward") is before
    assert "_loss_function" not in vars(model)
    assert "forward" not in vars(model.lm_head)
    assert session.tap._calls == []
    losses = []
    for one_pass in (None, made._one_pass):  # two passes read what was just run, not what the error left behind
        made._one_pass, batch = one_pass, tiny.batches(1, seed=4)[0]
        made._counts = session.count([batch])
        losses.append(made.compute_loss(made.model.train(), dict(batch)).item())
        session.gradients_ready()
    fresh = attached(host, [TMKL])
    tiny.shake(fresh.model, 0.4)
    fresh.current_gradient_accumulation_steps = 1
    expected = fresh.compute_loss(fresh.model.train(), dict(batch)).item()
    assert losses == pytest.approx([expected, expected], rel=BAR)


@pytest.mark.parametrize("host", ["sft", "trainer"])
def test_an_error_after_a_forward_leaves_no_note_of_it(host):
    """Whatever broke off, the next micro-batch is not taken for the second since the last loss."""
    made, batch = attached(host, [TMKL]), tiny.batches(1)[0]
    made.current_gradient_accumulation_steps = 1
    made._counts = made.holdfast.count([batch])

    def fail(*args):
        raise Fails

    hook = made.model.register_forward_hook(fail)
    with pytest.raises(Fails):
        made.compute_loss(made.model.train(), dict(batch))
    hook.remove()
    assert made.compute_loss(made.model, dict(batch)).isfinite()
