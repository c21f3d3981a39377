"""What every registered method owes: a new one gets these tests by being registered."""

import copy
import json
from dataclasses import asdict, fields
from pathlib import Path

import holdfast
import pytest
import torch
from holdfast.core.errors import ConfigError
from holdfast.core.method import GradientMethod, OutputMethod, WeightMethod
from holdfast.core.registry import get, methods

import runs
import tiny

METHODS = methods()
DOCS = Path(__file__).parents[2] / "docs" / "methods"


def names(kind=object):
    return [pytest.param(cls, id=name) for name, cls in METHODS.items() if issubclass(cls, kind)]


def model(kind):
    return tiny.lora(tiny.llama()) if kind == "lora" else tiny.llama()


def retain():
    """Two sets, by the names that methods look for when nothing else is said."""
    return {"alignment": tiny.batches(3), "task": tiny.batches(3, seed=7)}


def session_of(made, student, **options):
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    return holdfast.preserve(student, optimizer, [made], retain=retain(), **options)


def one_step(session, student, batch):
    """Gradients after one step whose task loss is nothing: what is left is the method's doing."""
    student.zero_grad()
    logits = student(**{k: v for k, v in batch.items() if k != "labels"}).logits
    (0.0 * logits.sum() + session.loss(batch)).backward()
    session.gradients_ready()
    return {n: p.grad.clone() for n, p in student.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("cls", names())
def test_config_round_trip(cls):
    made = cls(strength=0.25, select=("*lora_B*", "*q_proj*"))
    stored = json.loads(json.dumps(asdict(made)))
    assert get(made.name)(**stored) == made
    assert hash(made) == hash(get(made.name)(**stored))


@pytest.mark.parametrize("cls", names())
def test_all_faults_at_once(cls):
    with pytest.raises(ConfigError) as caught:
        cls(strength=-1.0, select=(), refresh_every=0)
    assert len(caught.value.faults) >= 3
    assert all(word in str(caught.value) for word in ("strength", "select", "refresh_every"))
    with pytest.raises(ConfigError, match="strength"):
        cls(strength=float("nan"))


@pytest.mark.parametrize("cls", names())
def test_frozen_documented_and_named(cls):
    made = cls()
    with pytest.raises(AttributeError):
        made.strength = 2.0
    page = DOCS / f"{made.name}.md"
    assert page.is_file(), f"write {page}"
    for field in fields(made):
        assert field.name in cls.__doc__ + "".join(base.__doc__ or "" for base in cls.__mro__), field.name
        if field.name not in ("strength", "select", "refresh_every", "budget", "budget_every"):  # docs/budget.md
            assert f"`{field.name}`" in page.read_text(), f"{page} does not mention {field.name}"


@pytest.mark.parametrize("kind", ["lora", "dense"])
@pytest.mark.parametrize("cls", names())
def test_strength_0_is_the_plain_run(cls, kind):
    torch.manual_seed(0)
    alone, _ = runs.loop(None, model(kind))
    torch.manual_seed(0)
    off, _ = runs.loop([cls(strength=0)], model(kind))
    assert runs.identical(off, alone)


@pytest.mark.parametrize("kind", ["lora", "dense"])
@pytest.mark.parametrize("cls", names(OutputMethod | WeightMethod))
def test_nothing_at_the_start_and_something_later(cls, kind):
    """Exactly nothing with the base at hand; what is kept of it is right to rounding: tests/core/test_retain_stream."""
    student, batch = model(kind), tiny.batches(1)[0]
    live = {"cache": False} if issubclass(cls, OutputMethod) and cls.uses_retain else {}
    with session_of(cls(**live), student) as session:
        first = one_step(session, student, batch)
        logged = session.pop_metrics()
        tiny.shake(student)
        later = one_step(session, student, batch)
        logged_later = session.pop_metrics()
    assert all(not g.any() for g in first.values())
    key = f"holdfast/{cls.name}/" + ("loss" if issubclass(cls, OutputMethod) else "penalty")
    assert logged[key] == 0.0
    assert logged_later[key] > 0.0
    assert sum(g.abs().sum() for g in later.values()) > 0


@pytest.mark.parametrize("cls", names())
def test_finite_in_bfloat16(cls):
    student, batch = model("lora").to(torch.bfloat16), tiny.batches(1)[0]
    with session_of(cls(), student) as session:
        one_step(session, student, batch)
        tiny.shake(student)
        gradients = one_step(session, student, batch)
        metrics = session.pop_metrics()
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients.values())
    assert all(torch.isfinite(torch.tensor(v)) for v in metrics.values())


@pytest.mark.parametrize("cls", names(WeightMethod | GradientMethod))
def test_unselected_parameters_are_untouched(cls):
    student, batch = model("lora"), tiny.batches(1)[0]
    with session_of(cls(select=("*lora_B*",)), student) as session:
        session.gradients_ready()
        tiny.shake(student)
        student.zero_grad()
        student(**batch).loss.backward()
        before = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
        session.gradients_ready()
        after = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert all(torch.equal(before[n], after[n]) for n in before if "lora_B" not in n)


@pytest.mark.parametrize("cls", names())
def test_save_and_load(cls, tmp_path):
    """A session that is loaded does what the saved one would have done next."""
    batches = tiny.batches(4)

    def steps(session, student, rows):
        for batch in rows:
            one_step(session, student, batch)
            with torch.no_grad():
                for p in student.parameters():
                    if p.grad is not None:
                        p.sub_(0.1 * p.grad + 0.01)  # the constant moves it away from the start
        return student

    student = model("lora")
    with session_of(cls(), student) as session:
        steps(session, student, batches[:2])
        session.save(tmp_path)
        middle = copy.deepcopy(student.state_dict())
        steps(session, student, batches[2:])
    resumed = model("lora")
    with session_of(cls(), resumed) as session:
        session.load(tmp_path)
        resumed.load_state_dict(middle)
        steps(session, resumed, batches[2:])
    assert runs.identical(resumed, student)


@pytest.mark.parametrize("cls", names())
def test_trains_on_trl(cls):
    trainer = runs.train("sft", [cls()], steps=3, retain=retain())
    keys = {k for entry in trainer.state.log_history for k in entry if k.startswith(f"holdfast/{cls.name}/")}
    assert keys
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_the_docs_have_no_page_of_a_method_that_is_not_there():
    pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    assert pages == set(METHODS)
