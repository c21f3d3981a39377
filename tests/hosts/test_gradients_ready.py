"""Gradient transforms see accumulated, averaged, unscaled, unclipped gradients, once per step; the host then clips."""

from dataclasses import dataclass, replace
from typing import ClassVar

import holdfast
import pytest
import torch
from holdfast.core.method import GradientMethod, WeightMethod
from holdfast.core.types import State, Step
from holdfast.functional import named
from holdfast.methods import AGEM, L2SP

import runs
import tiny


@dataclass(frozen=True, kw_only=True)
class Witness(GradientMethod):
    """Notes what it sees and makes every gradient 100 times as large."""

    name: ClassVar[str] = "witness"
    seen: ClassVar[list] = []
    factor: float = 100.0

    def transform(self, state: State, step: Step) -> Step:
        self.seen.append((step.number, named.clone(step.direction)))
        return replace(step, direction={k: self.factor * g for k, g in step.direction.items()})


@dataclass(frozen=True, kw_only=True)
class Pull(WeightMethod):
    """A penalty with gradient 1 everywhere."""

    name: ClassVar[str] = "pull"

    def penalty(self, state, weights):
        return torch.stack([p.sum() for p in weights.params.values()]).sum()


@pytest.fixture(autouse=True)
def _forget():
    Witness.seen.clear()


def accumulated_gradient(batch):
    """The gradient of the mean token loss over all four rows, by hand."""
    model = tiny.lora(tiny.llama())
    model(**batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dense"])
@pytest.mark.parametrize("host", ["sft", "dpo", "trainer"])
def test_once_per_optimizer_step_and_before_the_clip(host, kind, checkpointing):
    norms = []

    def watch(trainer):
        clip = trainer.accelerator.clip_grad_norm_

        def noted(parameters, *args, **kwargs):
            parameters = list(parameters)
            norms.append(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item())
            return clip(parameters, *args, **kwargs)

        trainer.accelerator.clip_grad_norm_ = noted

    model = tiny.lora(tiny.llama()) if kind == "lora" else tiny.llama()
    trainer = runs.trainer(host, model, steps=3, max_grad_norm=0.01, gradient_checkpointing=checkpointing)
    holdfast.attach(trainer, [Witness()])
    watch(trainer)
    trainer.train()
    assert [number for number, _ in Witness.seen] == [0, 1, 2]  # six micro-batches, three steps
    for (_, gradients), norm in zip(Witness.seen, norms, strict=True):
        seen = named.squared_norm(gradients).sqrt().item()
        assert seen > 0.01  # not clipped yet
        assert norm == pytest.approx(100 * seen, rel=1e-4)  # the host clips what the method returned
    assert all(
        entry["grad_norm"] == pytest.approx(n, rel=1e-4)
        for entry, n in zip(trainer.state.log_history, norms, strict=False)
    )


def test_the_gradient_is_the_mean_over_the_whole_step():
    batch = tiny.batches(3, size=4, seed=9)[0]
    runs.loop([Witness(factor=1.0)], split=4, steps=3)
    assert runs.difference(Witness.seen[0][1], accumulated_gradient(batch)) <= 1e-6


def test_a_loss_scaler_does_not_show():
    """Under fp16 gradients carry the scaler's factor; methods must not see it, and the scaler must find it again."""
    model = tiny.lora(tiny.llama())
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.0)
    batch = tiny.batches(3, size=4, seed=9)[0]
    plain = accumulated_gradient(batch)
    with holdfast.preserve(model, optimizer, [Witness(factor=2.0)]) as session:
        (model(**batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum()).loss * 1024).backward()
        session.gradients_ready(grad_scale=1024)
    assert runs.difference(Witness.seen[0][1], plain) <= 1e-6
    left = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert runs.difference(left, {k: 2048 * g for k, g in plain.items()}) <= 1e-6


@pytest.mark.parametrize("bad", ["inf", "nan"])
def test_an_overflow_is_left_to_the_scaler(bad):
    model = tiny.lora(tiny.llama())
    params = [p for p in model.parameters() if p.requires_grad]
    with holdfast.preserve(model, torch.optim.SGD(params, lr=0.1), [Witness(), Pull()]) as session:
        for p in params:
            p.grad = torch.ones_like(p)
        params[1].grad[0] = float(bad)  # one number is enough
        session.gradients_ready(grad_scale=65536.0)
    assert Witness.seen == []
    assert not params[1].grad[0].isfinite().any()  # the scaler will find them and skip the step


def test_penalties_first_transforms_last():
    """Whatever the order in the list, a transform also covers what the penalties push."""
    plain = accumulated_gradient(tiny.batches(3, size=4, seed=9)[0])
    for methods in ([Witness(factor=1.0), Pull()], [Pull(), Witness(factor=1.0)]):
        Witness.seen.clear()
        runs.loop(methods, steps=3)
        assert runs.difference(Witness.seen[0][1], {k: g + 1 for k, g in plain.items()}) <= 1e-6


def test_l2_sp_gradient_is_strength_times_distance():
    model = tiny.lora(tiny.llama())
    params = dict(model.named_parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with holdfast.preserve(model, optimizer, [L2SP(strength=0.5)]) as session:
        session.gradients_ready()
        start = tiny.trained(model)
        tiny.shake(model)
        moved = {name: params[name].detach() - start[name] for name in start}
        optimizer.zero_grad()
        session.gradients_ready()
    gradient = {name: params[name].grad for name in start}
    assert runs.difference(gradient, {k: 0.5 * d for k, d in moved.items()}) <= 1e-6


def retain_gradient(model, batches):
    """Gradient of the mean token loss over all retain batches, by the model's own loss."""
    tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    names, params = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    total = sum(model(**b, num_items_in_batch=tokens).loss for b in batches)
    return dict(zip(names, torch.autograd.grad(total, params), strict=True))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_agem_removes_conflict_and_nothing_else(sign):
    model, retain = tiny.lora(tiny.llama(attention_dropout=0.2), lora_dropout=0.2), tiny.batches(2)
    tiny.shake(model)
    model.eval()
    reference = retain_gradient(model, retain)
    model.train()
    params = dict(model.named_parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with holdfast.preserve(model, optimizer, [AGEM(retain_batches=2)], retain=retain) as session:
        generator = torch.Generator().manual_seed(4)
        noise = {k: 0.01 * torch.randn(g.shape, generator=generator) for k, g in reference.items()}
        before = {k: sign * reference[k] + noise[k] for k in reference}
        for name, gradient in before.items():
            params[name].grad = gradient.clone()
        state = torch.get_rng_state()
        session.gradients_ready()
        assert torch.equal(torch.get_rng_state(), state)  # the reference gradient drew no random number
        assert all(module.training for module in model.modules())
    after = {name: params[name].grad for name in before}
    if sign > 0:
        assert runs.difference(after, before) == 0.0
    else:
        inside = named.dot(after, reference) / (named.squared_norm(after) * named.squared_norm(reference)).sqrt()
        assert abs(inside.item()) <= 1e-5
        removed = {k: before[k] - after[k] for k in before}
        along = named.dot(removed, reference) / (named.squared_norm(removed) * named.squared_norm(reference)).sqrt()
        assert abs(along.item()) == pytest.approx(1.0, abs=1e-5)  # what went was along the reference gradient


def test_metrics_reach_the_trainers_log():
    trainer = runs.train("sft", [AGEM(), L2SP()], steps=3)
    entry = trainer.state.log_history[1]
    assert {"holdfast/agem/cosine", "holdfast/agem/removed", "holdfast/l2_sp/penalty"} <= entry.keys()
    assert entry["holdfast/l2_sp/penalty"] > 0
    assert -1 <= entry["holdfast/agem/cosine"] <= 1
