"""What the fast forms must not lose: the gradient of a small KL in bfloat16, and the tail of a confident target.

Both are measured against float64 on the same numbers; `divergence` runs and records them. Read next:
`holdfast.functional.closed_form`, where the forms come from.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from holdfast.functional.divergence import log_miss_probability, target_masked_kl
from holdfast.functional.head import Head
from holdfast.functional.linear_divergence import linear_cross_entropy
from peers import VARIANTS, Case, make
from record import Row
from torch import Tensor

OURS, USUAL = "holdfast: masked KL", "autograd: masked KL"
TAIL, SUBTRACTED = "holdfast: tail", "subtracted from the whole"
GAP = 20.0  # by which the target's logit exceeds the log-sum-exp of all others


def gradient(name: str, case: Case) -> tuple[float, Tensor]:
    """Run a variant forward and backward; return the value and the gradient on the hidden states."""
    value = VARIANTS[name].run(case)
    return value.item(), torch.autograd.grad(value, case.hidden)[0]


def small_kl(shape: str = "512/32000", tokens: int = 64) -> list[Row]:
    """Relative error of the masked KL's gradient in bfloat16 at a KL near 1e-3 a token."""
    case = make(shape, tokens, "bfloat16")
    exact = case.hidden.detach().double().requires_grad_()
    weight = case.head.weight.double()
    truth = target_masked_kl(exact @ weight.t(), case.reference_hidden.double() @ weight.t(), case.targets)
    (wanted,) = torch.autograd.grad(truth, exact)
    print(f"KL per token {truth.item() / tokens:.2e}")
    rows: list[Row] = []
    for name in (OURS, USUAL):
        error = ((gradient(name, case)[1].double() - wanted).norm() / wanted.norm()).item()
        common: Row = {"dtype": "bfloat16", "shape": shape, "tokens": tokens, "variant": name}
        rows.append({**common, "metric": "gradient error", "value": error})
    return rows


def confident_target(vocab: int = 2048, tokens: int = 64) -> list[Row]:
    """Errors of 1 − p(y) (relative) and of L, the log-sum-exp of all but y (absolute), in float32 at a gap of 20."""
    z = 3.2 * torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(0))
    y = torch.arange(tokens)[:, None]
    z.scatter_(1, y, -torch.inf)
    z.scatter_(1, y, z.logsumexp(1, keepdim=True) + GAP)
    others = z.double().scatter(1, y, -torch.inf).logsumexp(1)
    at_y = z.double().gather(1, y).squeeze(1)
    miss = torch.sigmoid(others - at_y)

    # ours: the gradient at y of the cross-entropy is p(y) − 1, and a head of the identity makes hidden states logits
    hidden = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(linear_cross_entropy(hidden, Head(torch.eye(vocab)), y.squeeze(1)), hidden)
    log_miss = log_miss_probability(z, y)
    tail = at_y.float() + log_miss + F.cross_entropy(z, y.squeeze(1), reduction="none")
    # the usual: take p(y) from one, and from the whole
    p = z.softmax(1).gather(1, y).squeeze(1)
    found = {
        TAIL: (torch.stack([-slope.gather(1, y).squeeze(1), log_miss.exp()]), tail),
        SUBTRACTED: (1 - p, z.logsumexp(1) + torch.log1p(-p)),
    }
    rows: list[Row] = []
    for name, (missed, total) in found.items():
        common: Row = {"dtype": "float32", "shape": f"{vocab}/{vocab}", "tokens": tokens, "variant": name}
        relative = ((missed.double() - miss) / miss).abs().max().item()
        rows.append({**common, "metric": "relative error of 1 - p(y)", "value": relative})
        rows.append({**common, "metric": "error of L", "value": (total.double() - others).abs().max().item()})
    return rows
