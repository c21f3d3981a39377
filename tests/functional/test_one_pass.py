"""One pass gives the two losses and all that hosts log of a row, as float64 on whole logits gives them."""

import pytest
import torch
import torch.nn.functional as F
from holdfast.functional.divergence import Divergence, logit_divergence
from holdfast.functional.head import Head
from holdfast.functional.linear_divergence import linear_cross_entropy_with_divergence

HEADS = [{}, {"bias": True}, {"soft_cap": 2.0, "scale": -1.5, "bias": True}]
MEMBERS = [
    Divergence(),
    Divergence("none"),
    Divergence(gamma=1.0, exclusion=0.5),
    Divergence(direction="reverse"),
    Divergence("none", direction="js"),
]


def make(dtype=torch.float64, tokens=13, width=7, vocab=50, drift=1.0, trained=True, spread=1.0, **head):
    """A student and a base; the third token is ignored."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    reference_hidden, weight = normal(tokens, width), spread * normal(vocab, width)
    hidden = reference_hidden + drift * normal(tokens, width)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    if tokens > 2:
        targets[2] = -100
    bias = normal(vocab).to(dtype) if head.pop("bias", False) else None
    head = Head(weight.to(dtype).requires_grad_(trained), bias, **head)
    return hidden.to(dtype).requires_grad_(), reference_hidden.to(dtype), head, targets


def on_logits(hidden, reference_hidden, head, targets, member, strength):
    """The plain twin, in float64: loss, cross-entropy, divergence, and the statistics by torch's own distributions."""
    weight, bias = (None if x is None else x.double() for x in (head.weight, head.bias))
    wide = Head(weight, bias, scale=head.scale, soft_cap=head.soft_cap)
    z, b = wide.logits(hidden.double()), wide.logits(reference_hidden.double()).detach()
    rows = F.cross_entropy(z, targets, reduction="none")
    kl = logit_divergence(z, b, targets, member)
    supervised = targets != -100
    entropy = torch.distributions.Categorical(logits=z.detach()).entropy() * supervised
    return rows.sum() + strength * kl, rows, kl, entropy, (z.argmax(-1) == targets) & supervised


@pytest.mark.parametrize("member", MEMBERS, ids=str)
@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_everything_equals_the_plain_twin(member, options, dtype):
    case = make(dtype, **options)
    hidden, _, head, targets = case
    targets[:4] = head.logits(hidden)[:4].argmax(-1)  # so that some are the likeliest token
    targets[2] = -100
    loss, rows, kl, entropy, top1 = on_logits(*case, member, 0.7)
    found = linear_cross_entropy_with_divergence(*case, member, 0.7, chunk_rows=5, statistics=True)
    rtol, atol = (1e-10, 1e-12) if dtype is torch.float64 else (1e-5, 1e-6)

    def close(mine, theirs):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=rtol, atol=atol)

    close(found.loss, loss)
    close(found.divergence, kl)
    close(found.cross_entropy, rows.sum())
    close(found.statistics.cross_entropy, rows)
    close(found.statistics.entropy, entropy)
    assert torch.equal(found.statistics.top1, top1)
    assert 0 < top1.sum() < len(targets) - 1
    for mine, theirs in zip(
        torch.autograd.grad(found.loss, (hidden, head.weight)),
        torch.autograd.grad(loss, (hidden, head.weight)),
        strict=True,
    ):
        close(mine, theirs)
    assert not any(value.requires_grad for value in (*found.statistics, found.divergence, found.cross_entropy))


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_without_a_divergence_it_is_the_cross_entropy(options):
    hidden, reference_hidden, head, targets = make(**options)
    found = linear_cross_entropy_with_divergence(hidden, None, head, targets, None, chunk_rows=4, statistics=True)
    _, rows, _, entropy, top1 = on_logits(hidden, reference_hidden, head, targets, Divergence(), 0.0)
    torch.testing.assert_close(found.statistics.cross_entropy, rows)
    torch.testing.assert_close(found.statistics.entropy, entropy)
    assert torch.equal(found.statistics.top1, top1)
    assert found.divergence == 0
    assert found.loss == found.cross_entropy
    (mine,), (theirs,) = (torch.autograd.grad(value, hidden) for value in (found.loss, rows.sum()))
    torch.testing.assert_close(mine, theirs)


def test_asking_for_statistics_changes_nothing_else():
    case = (*make(torch.float32), Divergence(), 0.7)
    with_them, without = (linear_cross_entropy_with_divergence(*case, statistics=asked) for asked in (True, False))
    assert without.statistics is None
    assert all(torch.equal(*pair) for pair in zip(with_them[:3], without[:3], strict=True))
    assert torch.equal(*(torch.autograd.grad(found.loss, case[0])[0] for found in (with_them, without)))


@pytest.mark.parametrize("gap", [0.0, 5.0, 16.1, 40.0, 100.0])
@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_the_entropy_of_a_sure_student_keeps_its_digits(gap, member):
    """It falls like gap · e^-gap: log-sum-exp minus mean logit, the usual form, has lost it at a gap of 16."""
    generator = torch.Generator().manual_seed(0)
    b, z = (2 * torch.randn(6, 200, generator=generator) for _ in range(2))
    y = torch.randint(200, (6, 1), generator=generator)
    z.scatter_(1, y, z.scatter(1, y, -1e30).logsumexp(1, keepdim=True) + gap)
    found = linear_cross_entropy_with_divergence(z, b, Head(torch.eye(200)), y.squeeze(1), member, statistics=True)
    exact = z.double()
    others = exact.scatter(1, y, -1e30)
    miss = torch.sigmoid(others.logsumexp(1) - exact.gather(1, y).squeeze(1))  # 1 − p(y)
    log_hit = F.logsigmoid(exact.gather(1, y).squeeze(1) - others.logsumexp(1))
    rest = others.log_softmax(1)
    inner = -(rest.exp() * rest).sum(1)
    entropy = miss * (inner - miss.log()) - log_hit.exp() * log_hit
    torch.testing.assert_close(found.statistics.entropy.double(), entropy, rtol=1e-5, atol=1e-37)
    assert found.statistics.top1.all() or gap == 0


def test_of_equal_logits_the_first_is_the_likeliest():
    """As argmax, and so every host, has it; at the base itself, where equal stays equal."""
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    weight[3] = weight[1]
    hidden = weight[1:2].repeat(2, 1) * 3
    found = linear_cross_entropy_with_divergence(
        hidden, hidden, Head(weight), torch.tensor([1, 3]), Divergence(), statistics=True
    )
    assert found.statistics.top1.tolist() == [True, False]
    assert found.divergence == 0


def test_a_vocabulary_that_is_padded_with_minus_infinity():
    hidden, reference_hidden, head, targets = make(trained=False)
    padded = torch.cat([head.weight, torch.zeros(6, 7, dtype=torch.float64)])
    bias = torch.cat([torch.zeros(50), torch.full((6,), -torch.inf)]).double()
    case = (hidden, reference_hidden)
    for member in MEMBERS[:2]:
        whole, plain = (
            linear_cross_entropy_with_divergence(*case, each, targets, member, statistics=True)
            for each in (Head(padded, bias), head)
        )
        torch.testing.assert_close(whole.statistics, plain.statistics)
        torch.testing.assert_close(whole.loss, plain.loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_supervised_position_gives_zeros_in_the_shape_of_the_targets(dtype):
    hidden = torch.randn(2, 3, 7, dtype=dtype, requires_grad=True)
    head = Head(torch.randn(50, 7, dtype=dtype))
    none = torch.full((2, 3), -100)
    found = linear_cross_entropy_with_divergence(hidden, hidden.detach(), head, none, Divergence(), statistics=True)
    for values in found.statistics:
        assert values.shape == (2, 3)
        assert not values.any()
    assert (torch.autograd.grad(found.loss, hidden)[0] == 0).all()


def test_in_bfloat16_the_statistics_are_no_worse_than_those_of_bfloat16_logits():
    """The control is what hosts do there: a product rounded to bfloat16, widened before the softmax."""
    hidden, reference_hidden, head, targets = make(
        torch.bfloat16, tokens=64, width=256, vocab=4000, drift=0.05, trained=False, spread=0.2
    )
    case = hidden, reference_hidden, head, targets
    _, rows, _, entropy, _ = on_logits(*case, Divergence(), 1.0)
    found = linear_cross_entropy_with_divergence(*case, Divergence(), statistics=True).statistics
    z = head.logits(hidden).float()
    usual = F.cross_entropy(z, targets, reduction="none"), torch.distributions.Categorical(logits=z).entropy()
    supervised = targets != -100
    for mine, theirs, truth in ((found.cross_entropy, usual[0], rows), (found.entropy, usual[1], entropy)):
        error, control = ((x.double() - truth)[supervised].abs().mean() for x in (mine, theirs))
        assert error <= 1.2 * control
        assert control > 1e-4  # the comparison is about something


def test_half_a_divergence_is_refused():
    hidden, reference_hidden, head, targets = make()
    with pytest.raises(ValueError, match="Pass both, or neither"):
        linear_cross_entropy_with_divergence(hidden, None, head, targets, Divergence())
    with pytest.raises(ValueError, match="Pass both, or neither"):
        linear_cross_entropy_with_divergence(hidden, reference_hidden, head, targets, None)
