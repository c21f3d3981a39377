"""The tap reads hidden states whose head gives the model's own logits, over many families, or says why it cannot."""

import holdfast
import pytest
import torch
from holdfast.core.errors import NotYetSupported, WrongSetup
from holdfast.core.reference import probe_batch
from holdfast.core.tap import Tap
from holdfast.methods import FullKL

import families
import tiny


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("adapter", ["dense", "lora"])
def test_head_of_hidden_is_the_logits_and_the_loss_is_right(family, adapter):
    model = families.build(family)
    if adapter == "lora":
        model = tiny.lora(model)
    model.eval()  # no router noise: the check below computes the loss a second time from the logits
    params = [p for p in model.parameters() if p.requires_grad]
    batch = tiny.batches(1)[0]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        base = model(**inputs).logits
    with holdfast.preserve(model, torch.optim.SGD(params, lr=0.1), [FullKL(strength=1.0)]) as session:
        tiny.shake(model, 0.05 if adapter == "dense" else 0.4)
        logits = model(**inputs).logits
        loss = session.loss(batch)
        session.tap.check(probe_batch(model))
    keep = batch["labels"][:, 1:] != -100
    p, q = (x[:, :-1][keep].double().log_softmax(-1) for x in (base, logits))
    expected = (p.exp() * (p - q)).sum() / keep.sum()
    assert expected > 1e-4
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    ours, theirs = (torch.autograd.grad(x, params, allow_unused=True, retain_graph=True) for x in (loss, expected))
    apart = sum(((a - b) ** 2).sum() for a, b in zip(ours, theirs, strict=True) if b is not None)
    size = sum((b**2).sum() for b in theirs if b is not None)
    assert (apart / size).sqrt() <= 2e-3


@pytest.mark.parametrize("field", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_a_scale_or_cap_that_is_read_wrong_is_refused(field):
    model = tiny.llama()
    setattr(model.config, field, 2.0)  # says so, but Llama does nothing of the kind
    with pytest.raises(NotYetSupported, match="is not the logits of LlamaForCausalLM"):
        Tap(model).check(probe_batch(model))


def test_a_model_that_does_something_of_its_own_is_refused():
    class Odd(type(tiny.llama())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.arange(96) / 10
            return output

    model = tiny.llama()
    model.__class__ = Odd
    with pytest.raises(NotYetSupported, match="they differ by"):
        Tap(model).check(probe_batch(model))
    # a weight method needs no logits, and still works
    with holdfast.preserve(model, torch.optim.SGD(model.parameters(), lr=0.1), [holdfast.methods.L2SP()]) as session:
        session.gradients_ready()


class Body(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(96, 16)
        self.recurrent = torch.nn.GRU(16, 16, batch_first=True)

    def forward(self, input_ids):
        return self.recurrent(self.embed(input_ids))  # a tuple whose first part is the hidden state


class Plain(torch.nn.Module):
    """No transformers model: a recurrent body and a head."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.out = torch.nn.Linear(16, 96)

    def forward(self, input_ids, attention_mask=None):
        return self.out(self.body(input_ids)[0])

    def get_input_embeddings(self):
        return self.body.embed


def test_a_module_of_ones_own_by_name():
    torch.manual_seed(0)
    model, batch = Plain(), tiny.batches(1)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(WrongSetup, match="Cannot find the backbone"):
        Tap(model)
    with pytest.raises(WrongSetup, match="no submodule 'bodi'"):
        Tap(model, backbone="bodi", head="out")
    with pytest.raises(WrongSetup, match="embed.weight is trained but lies outside"):
        Tap(model, backbone="body.recurrent", head="out")
    with torch.no_grad():
        base = model(batch["input_ids"])
    with holdfast.preserve(model, optimizer, [FullKL(strength=1.0)], backbone="body", head="out") as session:
        tiny.shake(model)
        logits = model(batch["input_ids"])
        loss = session.loss(batch)
    keep = batch["labels"][:, 1:] != -100
    p, q = (x[:, :-1][keep].log_softmax(-1) for x in (base, logits))
    assert loss.item() == pytest.approx(((p.exp() * (p - q)).sum() / keep.sum()).item(), rel=1e-4)
    assert loss.item() > 1e-3


def test_the_model_must_run_once_per_loss():
    model, (batch, *_) = tiny.lora(tiny.llama()), tiny.batches(2)
    params = [p for p in model.parameters() if p.requires_grad]
    with holdfast.preserve(model, torch.optim.SGD(params, lr=0.1), [FullKL()]) as session:
        with pytest.raises(WrongSetup, match="did not run"):
            session.loss(batch)
        model(**batch)
        model(**batch)
        with pytest.raises(WrongSetup, match="ran 2 times"):
            session.loss(batch, session.count([batch]))
        with torch.no_grad():
            model(**batch)  # an evaluation in between is none of the session's business
        model(**batch)
        assert session.loss(batch, session.count([batch])).item() == 0.0


def test_a_batch_without_targets_is_refused():
    model, (batch, *_) = tiny.lora(tiny.llama()), tiny.batches(1)
    params = [p for p in model.parameters() if p.requires_grad]
    with holdfast.preserve(model, torch.optim.SGD(params, lr=0.1), [FullKL()]) as session:
        model(**batch)
        with pytest.raises(
            WrongSetup, match=r"neither 'labels' nor 'completion_mask' \(keys: attention_mask, input_ids\)"
        ):
            session.loss({k: v for k, v in batch.items() if k != "labels"})


def test_closing_leaves_no_hook():
    model = tiny.lora(tiny.llama())
    params = [p for p in model.parameters() if p.requires_grad]
    with holdfast.preserve(model, torch.optim.SGD(params, lr=0.1), [FullKL()]) as session:
        assert session.tap.backbone._forward_hooks
    assert not any(module._forward_hooks for module in model.modules())
