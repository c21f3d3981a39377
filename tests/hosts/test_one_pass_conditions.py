"""Where the host's loss and a method's do not come from one pass: every condition, told; and the check in backward."""

import holdfast
import pytest
import torch
from holdfast.core.errors import WrongSetup
from holdfast.core.types import IGNORED
from holdfast.functional.divergence import Divergence
from holdfast.functional.head import Head
from holdfast.integrations.one_pass import over_positions
from holdfast.integrations.one_pass_parts import by_position, summed
from holdfast.methods import L2SP, SelfReplay, TargetMaskedKL
from one_pass_runs import TMKL, Waits, assert_same, attached, shown, trained
from transformers import LlamaForCausalLM
from trl import SFTTrainer

import families
import runs
import tiny


def subclassed(made):
    def compute_loss(self, *args, **options):
        return 2 * SFTTrainer.compute_loss(self, *args, **options)

    made.__class__ = type("Mine", (type(made),), {"compute_loss": compute_loss})


def split_up(made):
    made.model.get_base_model().hf_device_map = {"model": 0, "lm_head": 1}


def with_function(made):
    made.compute_loss_func = lambda outputs, labels, **_: outputs.logits.mean()


def own_loss(made):
    made.model.get_base_model().loss_function = lambda logits, labels, **_: logits.square().mean()


def on_itself(made):
    made.compute_loss = made.compute_loss


def with_liger(made):
    made.args.use_liger_kernel = True  # it is not installed here


def compiled(made):
    made.args.torch_compile = True


REFUSED = {
    "labels are smoothed": ("trainer", TMKL, {"label_smoothing_factor": 0.1}, None),
    "has a compute_loss_func": ("trainer", TMKL, {}, with_function),
    "loss_type is 'dft', not 'nll'": ("sft", TMKL, {"loss_type": "dft"}, None),
    "Mine computes a loss of its own": ("sft", TMKL, {}, subclassed),
    "set on the trainer itself": ("sft", TMKL, {}, on_itself),
    "DPOTrainer computes a loss of its own": ("dpo", TMKL, {}, None),
    "use_liger_kernel": ("trainer", TMKL, {}, with_liger),
    "the model is compiled": ("sft", TMKL, {}, compiled),
    "split across devices": ("sft", TMKL, {}, split_up),
    "not ForCausalLMLoss": ("trainer", TMKL, {}, own_loss),
    "asks for more than the sum": ("sft", TargetMaskedKL(normalise="kept", exclusion=0.1), {}, None),
    "not on the completion alone": ("sft", TargetMaskedKL(positions="all"), {}, None),
    "a share of the task's sequences": ("sft", TargetMaskedKL(reference_share=0.5), {}, None),
}


@pytest.mark.parametrize("why", REFUSED)
def test_every_condition_is_checked_and_told(why):
    host, method, options, change = REFUSED[why]
    made = runs.trainer(host, **options)
    if change is not None:
        change(made)
    session = holdfast.attach(made, [method])
    told = [line for line in session.explain().splitlines() if line.startswith("Two passes over the head")]
    assert len(told) == 1
    assert why in told[0]
    assert "One pass over the head" not in session.explain()


def test_a_model_with_routers_is_refused_where_their_loss_is_added():
    made = runs.trainer("sft", families.build("mixtral, mixture of experts"))
    assert "auxiliary loss of its routers" in holdfast.attach(made, [TMKL]).explain()
    made = runs.trainer("trainer", families.build("mixtral, mixture of experts"))  # transformers adds it if asked alone
    assert "One pass over the head" in holdfast.attach(made, [TMKL]).explain()


class ReadsLogits(LlamaForCausalLM):
    """A model whose loss is more than its loss function's."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **options):
        output = super().forward(input_ids, attention_mask, labels=labels, **options)
        if labels is not None:
            output.loss = output.loss + 1e-2 * output.logits.float().square().mean()
        return output


@pytest.mark.parametrize("case", ["a condition", "the proof"])
def test_where_it_is_refused_todays_path_runs_bit_for_bit(case):
    def run(one_pass):
        torch.manual_seed(0)
        if case == "a condition":
            return trained("trainer", [TMKL], one_pass, label_smoothing_factor=0.1)
        return trained("trainer", [TMKL], one_pass, tiny.lora(ReadsLogits(tiny.llama().config)))

    one, two = run(True), run(False)
    assert ("fails" if case == "the proof" else "smoothed") in one.holdfast.explain()
    assert runs.identical(one.model, two.model)
    assert shown(one) == shown(two)


def test_labels_that_are_other_tokens_take_two_passes_and_say_so_once():
    def run(one_pass):
        made = attached("trainer", [TMKL], one_pass)
        for row in made.train_dataset[:6]:
            row["labels"] = torch.where(row["labels"] == IGNORED, IGNORED, (row["labels"] + 1) % 96)
        made.train()
        return made

    with pytest.warns(UserWarning, match="takes two passes over the head: its labels are other tokens") as told:
        one = run(True)
    assert sum("two passes" in str(each.message) for each in told) == 1
    assert one.holdfast.explain().count("Micro-batches that take two passes") == 1
    assert_same(one, run(False))


def test_a_hook_that_reads_logits_finds_them():
    """It may come at any time, so it is looked for at every step."""
    made, seen = attached("trainer", [TMKL], gradient_accumulation_steps=1, steps=1), []
    made.model.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    with pytest.warns(UserWarning, match="a forward hook on PeftModelForCausalLM may read the logits"):
        made.train()
    assert seen[0].isfinite().all()


def test_without_methods_on_the_task_there_is_nothing_to_tell():
    for methods in ([], [L2SP()], [SelfReplay()]):
        made = runs.trainer("sft")
        assert "pass" not in holdfast.attach(made, methods, retain=tiny.texts()).explain()


def test_the_mixin_takes_the_switch_too():
    class Mine(holdfast.PreservingMixin, SFTTrainer):
        pass

    plain = runs.trainer("sft")
    mine = Mine(
        model=tiny.lora(tiny.llama()), args=plain.args, train_dataset=tiny.prompt_completion(),
        processing_class=tiny.tokenizer(), methods=[TMKL], one_pass=False,
    )  # fmt: skip
    assert "it is off (one_pass=False)" in mine.holdfast.explain()


# --- the check at every backward pass ---------------------------------------------------------------------------------


def parts(ratio, parted=by_position, ignored=2, **options):
    """Two rows of a student near its base; what the host reads, and the sum of the divergence."""
    generator = torch.Generator().manual_seed(0)
    base, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 5, 8), (30, 8)))
    hidden = (base + 0.1 * torch.randn(2, 5, 8, generator=generator)).requires_grad_()
    labels = torch.randint(30, (2, 5), generator=generator)
    labels[:, ignored] = IGNORED
    case = hidden, labels, Head(weight), (base, Head(weight)), Divergence(), ratio
    return hidden, parted(over_positions(*case, statistics=parted is by_position), labels, ratio, **options)


@pytest.mark.parametrize("parted", [by_position, summed])
def test_a_host_that_weighs_tokens_as_supposed_gets_the_gradient_of_both(parted):
    def nll(read):
        return read if parted is summed else -read.log_probs.sum()

    hidden, (read, total) = parts(3.0, parted)
    (0.2 * nll(read) + 0.6 * total).backward()
    other, (alone, _) = parts(0.0, parted)
    (of_host,) = torch.autograd.grad(0.2 * nll(alone), other)
    assert (hidden.grad - of_host).abs().max() > 1e-3  # the divergence is in it
    both, (read, total) = parts(1.0, parted)
    (sums,) = torch.autograd.grad(nll(read) + total, both)
    torch.testing.assert_close((hidden.grad - of_host) / 0.6, sums - of_host / 0.2)


OTHERWISE = {
    "the sum weighs less than was supposed": (by_position, lambda rows, total: -rows.log_probs.sum() + 2.5 * total),
    "the method's loss got lost": (by_position, lambda rows, total: -rows.log_probs.sum()),
    "tokens differ": (
        by_position,
        lambda rows, total: -(rows.log_probs * rows.log_probs.detach().exp()).sum() + 3 * total,
    ),
    "of two sums one weighs less": (summed, lambda nll, total: nll + 2.5 * total),
    "of two sums one got lost": (summed, lambda nll, total: nll),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_a_host_that_weighs_them_otherwise_is_stopped(case):
    parted, loss = OTHERWISE[case]
    _, (read, total) = parts(3.0, parted)
    with pytest.raises(WrongSetup, match=r"weighs its tokens otherwise.*one_pass=False"):
        loss(read, total).backward()


@pytest.mark.parametrize("case", OTHERWISE)
def test_a_check_that_must_not_wait_stops_it_too(case):
    """On a GPU that is an assertion of the device, which the program does not wait for."""
    parted, loss = OTHERWISE[case]
    _, (read, total) = parts(3.0, parted, waits=False)
    added = loss(read, total)
    with Waits() as waits, pytest.raises(RuntimeError, match="weighs its tokens otherwise"):
        added.backward()
    assert waits.seen == []


def test_positions_that_are_ignored_may_weigh_anything():
    hidden, (rows, total) = parts(ratio=3.0)
    (-(rows.log_probs * rows.mask).sum() + 3 * total).backward()
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("parted", [by_position, summed])
def test_of_no_token_nothing_comes_and_nothing_is_wrong(parted):
    """A host that takes the mean divides by 0 there."""
    hidden, (read, total) = parts(0.0, parted, ignored=slice(None))
    nll = read if parted is summed else -read.log_probs.sum()
    (nll / 0.0 + total).backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
