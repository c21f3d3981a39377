"""On a real GPU: the loss against float64, every method in a loop, a real fp16 scaler."""

import holdfast
import pytest
import torch
from holdfast.functional.divergence import Divergence, target_masked_kl
from holdfast.functional.head import Head
from holdfast.functional.linear_divergence import linear_divergence
from holdfast.methods import AGEM, L2SP, FullKL, TargetMaskedKL

import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 2e-3), (torch.bfloat16, 3e-2)])
def test_gradient_of_a_small_kl(dtype, bar):
    """The KL's gradient at a drift of one per cent, where rounding logits apart would lose most of it."""
    generator = torch.Generator("cuda").manual_seed(0)
    rows, hidden, vocab = 512, 512, 32_000

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    base = normal(rows, hidden)
    weight = normal(vocab, hidden) * 3.2 / hidden**0.5
    student = (base + 0.01 * normal(rows, hidden)).to(dtype)
    base, weight = base.to(dtype), weight.to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=generator, device="cuda")
    h = student.clone().requires_grad_()
    loss = linear_divergence(h, base, Head(weight), targets, Divergence())
    (ours,) = torch.autograd.grad(loss, h)
    exact = student.double().requires_grad_()
    truth = target_masked_kl(exact @ weight.double().T, base.double() @ weight.double().T, targets)
    (theirs,) = torch.autograd.grad(truth, exact)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-2)
    assert ((ours.double() - theirs).norm() / theirs.norm()).item() <= bar


def loop(model, methods, scaler=None, autocast=None, steps=4):
    batches = [{k: v.cuda() for k, v in b.items()} for b in tiny.batches(steps)]
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.1)
    model.train()
    with holdfast.preserve(model, optimizer, methods, retain=batches[:2]) as session:
        for batch in batches:
            with torch.autocast("cuda", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                loss = model(**batch).loss
            loss = loss + session.loss(batch)
            (scaler.scale(loss) if scaler else loss).backward()
            session.gradients_ready(scaler.get_scale() if scaler else 1.0)
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            optimizer.zero_grad()
        return session.pop_metrics()


METHODS = [TargetMaskedKL(), FullKL(positions="prompt"), L2SP(strength=0.1), AGEM()]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_every_method_as_on_the_cpu(autocast):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny.lora(tiny.llama()).cuda()
    metrics = loop(model, METHODS, autocast=autocast)
    assert metrics["holdfast/target_masked_kl/divergence"] > 0
    on_cpu = tiny.lora(tiny.llama())
    from unittest.mock import patch

    with patch.object(torch.Tensor, "cuda", lambda self: self):  # the same loop, its batches left where they are
        loop(on_cpu, METHODS)
    start = tiny.trained(tiny.lora(tiny.llama()))
    ours = {k: v.cpu() - start[k] for k, v in tiny.trained(model).items()}
    theirs = {k: v - start[k] for k, v in tiny.trained(on_cpu).items()}
    apart = sum(((ours[k] - theirs[k]) ** 2).sum() for k in ours) ** 0.5
    size = sum((theirs[k] ** 2).sum() for k in ours) ** 0.5
    assert apart / size <= (1e-3 if autocast is None else 0.1)


def test_a_real_scaler():
    """fp16 with a real GradScaler: methods see unscaled gradients, and the first overflow is left to it."""
    model = tiny.lora(tiny.llama()).cuda()
    plain = tiny.lora(tiny.llama()).cuda()
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    scaled, straight = loop(model, METHODS, scaler, torch.float16), loop(plain, METHODS, None, torch.float16)
    assert scaled["holdfast/agem/cosine"] == pytest.approx(straight["holdfast/agem/cosine"], abs=0.05)
    assert all(torch.isfinite(p).all() for p in model.parameters())
