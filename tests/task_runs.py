"""Plain loops over tiny models with what is kept of the base on the task: what several tests of it share."""

import holdfast
import pytest
import torch
from holdfast.core.reference import AdapterOff
from holdfast.core.selection import adapters_off
from holdfast.core.tap import Tap
from holdfast.methods import TargetMaskedKL
from holdfast.retain.task_cache import TaskCache
from holdfast.retain.task_kinds import Keeping

import tiny

CPU = ("cpu", torch.bfloat16, False)


def tuned(model=None, dtype=torch.float32, **changes):
    """A model whose adapter has moved."""
    model = tiny.lora((model or tiny.llama()).to(dtype), **changes)
    tiny.shake(model, size=0.05)
    return model.train()


def run(model, methods, batches, *, moved=None, **options):
    """The loss and the gradient of every batch, how often the base ran, and the session's last words.

    `moved` seeds how what is trained moves away from where it was when the session began.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer, ran, found = torch.optim.SGD(params, lr=0.0), [], []
    settings = {"reference": "base", "share_prefix": False, **options}
    with holdfast.preserve(model, optimizer, methods, **settings) as session:
        if moved is not None:
            tiny.shake(model, size=0.05, seed=moved)
        plain = session.reference.hidden
        session.reference.hidden = lambda *given: ran.append(1) or plain(*given)
        for batch in batches:
            torch.manual_seed(0)  # of dropout
            model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
            loss = session.loss(batch)
            gradients = torch.autograd.grad(loss, params, allow_unused=True)
            found.append((loss.detach(), torch.cat([g.flatten() for g in gradients if g is not None])))
            session.gradients_ready()
        session.told, session.logged = session.explain(), session.pop_metrics()
    return found, len(ran), session


def kept(folder, methods=(TargetMaskedKL(),), model=None):
    """A cache of its own, outside a session, and a list that grows with every pass of the base."""
    model = model or tuned()
    reference = AdapterOff(lambda: adapters_off(model))
    ran, plain = [], reference.hidden
    reference.hidden = lambda *given: ran.append(1) or plain(*given)
    return TaskCache(Tap(model), reference, methods, Keeping(folder)), ran


def assert_same(ours, theirs, rtol):
    assert len(ours) == len(theirs)
    for (loss, gradient), (expected, slow) in zip(ours, theirs, strict=True):
        assert expected > 1e-3
        assert loss.item() == pytest.approx(expected.item(), rel=rtol, abs=rtol)
        assert (gradient - slow).norm() <= rtol * slow.norm()


def rows_of(batches):
    """The rows of batches without their padding."""
    found = []
    for batch in batches:
        for row, real in enumerate(batch["attention_mask"].bool()):
            found.append({name: value[row][real] for name, value in batch.items()})
    return found


def padded(rows, extra=0):
    """A batch of rows, padded on the right and by so many columns more."""
    width = max(len(row["input_ids"]) for row in rows) + extra
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.stack([torch.nn.functional.pad(r[name], (0, width - len(r[name])), value=value) for r in rows])
        for name, value in fill.items()
    }


def packed(rows, *, mask=False):
    """A batch of one row that holds documents one after another."""
    ids, labels = (torch.cat([row[name] for row in rows])[None] for name in ("input_ids", "labels"))
    at = torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None]
    labels = labels.masked_fill(at == 0, -100)
    batch = {"input_ids": ids, "labels": labels, "position_ids": at}
    return batch | ({"attention_mask": torch.ones_like(ids)} if mask else {})
