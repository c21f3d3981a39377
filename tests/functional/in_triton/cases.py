"""What the interpreted tests share: small inputs, the float64 truth on whole logits, and the relative error."""

import pytest
import torch
import torch.nn.functional as F
from holdfast.functional.divergence import logit_divergence
from holdfast.functional.head import Head

# the interpreter computes both branches of a choice in numpy, which speaks up about the one that is not taken
QUIET = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


def make(seed=0, tokens=5, width=7, vocab=75, drift=0.3, dtype=torch.float32, ignored=2, **head):
    """Hidden states of a student that is `drift` away from its base, a frozen head, and targets, one ignored."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base, weight = normal(tokens, width), normal(vocab, width)
    hidden = base + drift * normal(tokens, width)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    if tokens > ignored:
        targets[ignored] = -100
    bias = normal(vocab).to(dtype) if head.pop("bias", False) else None
    return hidden.to(dtype).requires_grad_(), base.to(dtype), Head(weight.to(dtype), bias, **head), targets


def wide(case):
    """The same numbers in float64, with a fresh leaf."""
    hidden, base, head, targets = case
    bias = None if head.bias is None else head.bias.double()
    exact = Head(head.weight.double(), bias, head.scale, head.soft_cap)
    return hidden.detach().double().requires_grad_(), base.double(), exact, targets


def truth(case, member, *, strength=1.0, cross_entropy=0.0):
    """Value and gradient of an objective on whole float64 logits, by autograd."""
    hidden, base, head, targets = wide(case)
    z = head.logits(hidden)
    value = z.new_zeros(())
    if member is not None:
        value = value + strength * logit_divergence(z, head.logits(base), targets, member)
    if cross_entropy:
        value = value + cross_entropy * F.cross_entropy(z, targets, reduction="sum")
    return value.item(), torch.autograd.grad(value, hidden)[0]


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def gradient(value, case):
    return torch.autograd.grad(value, case[0])[0]
