"""Budgets on drift: what is held out, what is measured against whole logits in float64, and how a strength follows."""

import json
import math
from dataclasses import dataclass, replace

import holdfast
import pytest
import torch
from holdfast.core.budget import AIM, FARTHEST, LEAD, LEAST, MOST, RATE, SLOWEST, Budget, Budgets, unit_of
from holdfast.core.budget_settings import EVERY
from holdfast.core.errors import ConfigError, WrongSetup
from holdfast.core.held_out import LARGEST_SHARE, SEQUENCES, hold_out
from holdfast.core.method import GradientMethod, OutputMethod, WeightMethod
from holdfast.core.registry import methods
from holdfast.core.retain import Retain, sequences_of
from holdfast.methods import AGEM, EWC, L2SP, FullKL, SelfReplay, TargetMaskedKL, UpdateDecay

import runs
import tiny

AUTO = {"strength": "auto", "budget": 0.02}
BAR = 1e-10


def of_kind(*kinds):
    return [pytest.param(cls, id=name) for name, cls in methods().items() if issubclass(cls, kinds)]


def as_lists(sequences):
    return [ids.tolist() for ids in sequences]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", of_kind(OutputMethod, WeightMethod))
def test_a_budget_takes_the_place_of_a_strength(cls):
    made = cls(**AUTO)
    assert made.is_auto
    assert "strength='auto'" in made.describe()
    assert "budget=0.02" in made.describe()
    assert not cls().is_auto
    assert "budget" not in cls().describe()  # what checkpoints and ledgers of before say is what they would say now


@pytest.mark.parametrize("cls", of_kind(OutputMethod, WeightMethod))
def test_faults_of_a_budget_come_with_all_others(cls):
    with pytest.raises(ConfigError) as caught:
        cls(strength="auto", select=(), refresh_every=0, budget_every=0)
    assert sorted(fault.split()[0] for fault in caught.value.faults)[:3] == ["budget_every", "refresh_every", "select"]
    assert any("needs a budget" in fault for fault in caught.value.faults)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"strength": "auto"}, "strength is 'auto', which needs a budget"),
        ({"budget": 0.02}, "budget=0.02 is kept to by strength='auto' alone, and strength is 0.3"),
        ({"strength": 0, "budget": 0.02}, "and strength is 0: drop one"),
        ({"strength": "auto", "budget": 0}, "budget is how far the student may drift .* got 0"),
        ({"strength": "auto", "budget": math.inf}, "got inf"),
        ({"strength": "auto", "budget": True}, "got True"),
        ({"strength": "auto", "budget": "0.02"}, "got '0.02'"),
        ({"strength": "auto", "budget": {"refusal_margin": 0}}, r"got \('refusal_margin', 0\)"),
        ({"strength": "auto", "budget": {"refusal_margin": 0.1, "rare": 0.1}}, "the name of one measure .* got {'ref"),
        ({"strength": "auto", "budget": {}}, "got {}"),
        ({"strength": "auto", "budget": {"": 0.1}}, "budget needs the name of its measure as text, got ''"),
        ({"strength": "auto", "budget": {1: 0.1}}, "budget needs the name of its measure as text, got 1"),
        ({"strength": 1.0, "budget": {"refusal_margin": 0.1}}, "kept to by strength='auto' alone"),
        (
            {"strength": "auto", "budget": 0.02, "budget_every": 2.5},
            "budget_every must be a whole number >= 1, got 2.5",
        ),
        ({"budget_every": 2}, "budget_every=2 is of strength='auto', and strength is 0.3: drop it"),
        ({"strength": "aut0", "budget": 0.02}, "strength must be a number, or 'auto' with a budget, got 'aut0'"),
    ],
)
def test_what_is_wrong_is_said(settings, told):
    with pytest.raises(ConfigError, match=told):
        FullKL(**settings)


@pytest.mark.parametrize("cls", of_kind(GradientMethod))
def test_a_transform_cannot_keep_to_a_budget_and_says_why(cls):
    with pytest.raises(ConfigError, match="brings back nothing that has drifted"):
        cls(**AUTO)


# --- what is held out -------------------------------------------------------------------------------------------------


def test_held_out_rows_are_in_nobodys_hands():
    sets = {"one": tiny.batches(20, size=4), "two": tiny.batches(7, size=2, seed=8)}
    rest, held = hold_out(sets)
    before = [ids for batches in sets.values() for batch in batches for ids in sequences_of(batch)]
    after = [ids for batches in rest.values() for batch in batches for ids in sequences_of(batch)]
    assert len(held) == 80 // LARGEST_SHARE + 14 // LARGEST_SHARE
    assert sorted(as_lists(held) + as_lists(after)) == sorted(as_lists(before))
    assert not [ids for ids in as_lists(held) if ids in as_lists(after)]
    assert as_lists(hold_out(sets)[1]) == as_lists(held)


def test_about_so_many_are_held_out_however_the_rows_are_batched():
    one = {"text": tiny.batches(256, size=1)}
    rows = one["text"]
    four = {"text": [{k: torch.cat([row[k] for row in rows[i : i + 4]]) for k in rows[0]} for i in range(0, 256, 4)]}
    held = [as_lists(hold_out(sets)[1]) for sets in (one, four)]
    assert len(held[0]) == SEQUENCES
    assert held[0] == held[1]


def test_of_a_pair_the_chosen_answer_is_measured_and_the_pair_is_held_out():
    ids = torch.arange(2 * 8 * 3).view(16, 3) + 5
    pairs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": torch.ones_like(ids)}
    rest, held = hold_out({"pairs": [pairs]})
    assert as_lists(held) == ids[[3, 7]].tolist()
    assert rest["pairs"][0]["input_ids"].tolist() == ids[[0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14]].tolist()


def test_packed_rows_keep_their_common_positions():
    ids = torch.arange(8 * 6).view(8, 6) + 5
    packed = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    rest, held = hold_out({"packed": [packed]})
    assert as_lists(held) == [part.tolist() for row in (3, 7) for part in ids[row].split(3)]
    assert torch.equal(rest["packed"][0]["position_ids"], packed["position_ids"])


def test_only_the_sets_that_are_named_give_rows_away():
    sets = {"kept": tiny.batches(8, size=2), "task": tiny.batches(8, size=2, seed=8)}
    rest, held = hold_out(sets, ["kept"])
    assert all(one is other for one, other in zip(rest["task"], sets["task"], strict=True))
    assert as_lists(held) == as_lists(hold_out({"kept": sets["kept"]})[1])
    assert as_lists(hold_out(sets, ["unknown"])[1]) == as_lists(hold_out(sets)[1])  # its method says that it is unknown
    for made, names in (
        ([EWC(**AUTO, data=("kept",))], {"kept"}),
        ([EWC(**AUTO, data=("kept",)), UpdateDecay(strength=1.0)], {"kept"}),
        ([EWC(**AUTO, data=("kept",)), UpdateDecay(**AUTO)], {"kept", "task"}),
    ):
        with session_of(tiny.lora(tiny.llama()), made, retain=sets) as session:
            assert as_lists(session.budgets.held_out.sequences) == as_lists(hold_out(sets, names)[1])


def test_too_few_rows_are_refused():
    with pytest.raises(WrongSetup, match="7 retain rows leave 1. Give at least 8"):
        hold_out({"few": tiny.batches(7, size=1)})


# --- what is measured -------------------------------------------------------------------------------------------------


def session_of(model, made, **options):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return holdfast.preserve(model, optimizer, made, **{"retain": tiny.batches(20, size=2, seed=4), **options})


def slow(student, base, sequences):
    """KL(base || student), nats a token: one sequence at a time, from whole logits."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids in sequences:
            theirs, ours = base(ids), student.eval()(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            total += (theirs.exp() * (theirs - ours)).sum().item()
            tokens += len(ids) - 1
    student.train()
    return total / tokens


@pytest.mark.parametrize("kind", ["lora", "pissa", "dense"])
def test_the_drift_is_that_of_whole_logits(kind):
    """In float64; with dropout on in training, and the reference by adapter-off or by a frozen copy."""

    def made():
        model = tiny.llama(attention_dropout=0.2)
        if kind == "dense":
            return model.double().train()
        return (
            tiny.lora(model, lora_dropout=0.2, init_lora_weights="pissa" if kind == "pissa" else True).double().train()
        )

    student, start = made(), made().eval()
    with session_of(student, [FullKL(**AUTO)]) as session:
        held_out = session.budgets.held_out
        assert held_out.drift() == pytest.approx(0.0, abs=BAR)
        tiny.shake(student)
        state, training = torch.get_rng_state(), [module.training for module in student.modules()]
        measured = held_out.drift()
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in student.modules()] == training
        assert all(p.grad is None for p in student.parameters())
        with torch.no_grad():
            expected = slow(student, lambda ids: start(ids[None]).logits[0, :-1].log_softmax(-1), held_out.sequences)
    assert expected > 0.01
    assert measured == pytest.approx(expected, rel=BAR)


@pytest.mark.parametrize("made", [SelfReplay(**AUTO), EWC(**AUTO), TargetMaskedKL(on="retain", **AUTO)], ids=str)
def test_no_method_sees_what_is_held_out(made):
    rows = tiny.batches(20, size=2, seed=4)
    with session_of(tiny.lora(tiny.llama()), [made, AGEM()], retain=rows) as session:
        seen = as_lists(session.retain.sequences())
        held = as_lists(session.budgets.held_out.sequences)
    assert len(held) == 10
    assert len(seen) == 30
    assert not [ids for ids in held if ids in seen]
    assert sorted(seen + held) == sorted(as_lists(Retain(rows).sequences()))


def test_without_a_budget_nothing_is_held_out():
    rows = tiny.batches(20, size=2, seed=4)
    with session_of(tiny.lora(tiny.llama()), [SelfReplay()], retain=rows) as session:
        assert session.budgets.held_out is None
        assert as_lists(session.retain.sequences()) == as_lists(Retain(rows).sequences())


def test_a_budget_without_retain_data_or_reference_is_refused():
    from holdfast.core.session import Session

    with pytest.raises(WrongSetup, match="update_decay needs retain data"):
        Session(tiny.lora(tiny.llama()), [UpdateDecay(**AUTO)])
    with pytest.raises(WrongSetup, match="update_decay needs a reference"):
        Session(tiny.lora(tiny.llama()), [UpdateDecay(**AUTO)], retain=tiny.batches(20))


# --- how the strength follows -----------------------------------------------------------------------------------------


def followed(budget, unit, drifts):
    """The two lines of the module's docstring, by hand."""
    strengths, multiplier, before, aim = [], 1.0, 0.0, AIM * budget
    for drift in drifts:
        multiplier *= min(max(drift / aim, SLOWEST), FARTHEST) ** RATE
        multiplier = min(max(multiplier, LEAST), MOST)
        expected = drift * min(max(drift / before if before else LEAD, 1 / LEAD), LEAD)
        strengths.append(unit * multiplier * min(expected / aim, FARTHEST))
        before = drift
    return strengths


@pytest.mark.parametrize("made", [FullKL(**AUTO), UpdateDecay(**AUTO)], ids=["full_kl", "update_decay"])
def test_the_strength_follows_the_drift_as_the_equation_says(made):
    drifts = [0.0, 0.004, 0.03, 0.5, 0.2, 0.02, 0.018, 0.001, 0.018]
    budget, strengths = Budget(made), []
    for drift in drifts:
        budget.follow(drift)
        strengths.append(budget.method.strength)
    assert strengths == pytest.approx(
        followed(0.02, {"full_kl": 0.3, "update_decay": 1e-3}[made.name], drifts), rel=1e-12
    )
    assert strengths[0] == 0.0
    assert made.strength == "auto"


def test_drift_at_the_aim_leaves_the_strength_where_it_is():
    budget = Budget(FullKL(**AUTO))
    for drift in (0.05, AIM * 0.02, AIM * 0.02):
        budget.follow(drift)
    held = budget.method.strength
    assert held > 0.3  # it has been over its budget before
    for _ in range(20):
        budget.follow(AIM * 0.02)
    assert budget.method.strength == pytest.approx(held)


def test_a_drift_that_never_comes_near_its_budget_is_left_alone_and_caught_when_it_comes():
    budget = Budget(FullKL(**AUTO))
    for _ in range(1000):
        budget.follow(1e-4)
    assert budget.method.strength < 1e-3
    strengths = []
    for _ in range(40):
        budget.follow(0.05)
        strengths.append(budget.method.strength)
    assert strengths[1:] == sorted(strengths[1:])
    assert strengths[-1] > 100 * 0.3


def test_a_run_that_diverged_does_not_end_the_controller():
    budget = Budget(FullKL(**AUTO))
    budget.follow(0.01)
    budget.follow(math.nan)
    assert math.isfinite(budget.method.strength)
    assert budget.method.strength > 0.3
    budget.follow(0.01)
    assert math.isfinite(budget.method.strength)


def test_a_state_survives_json_to_the_last_bit():
    made = [FullKL(**AUTO), L2SP(), UpdateDecay(strength="auto", budget=0.5, budget_every=2)]

    class Fixed:
        digest = "the same"

        def __init__(self, drifts):
            self.drifts = iter(drifts)

        def drift(self):
            return next(self.drifts)

        def resume(self, digest):
            assert digest == self.digest

    def budgets(drifts):
        found = Budgets(made, lambda *_: None, torch.nn.Linear(1, 1), {})
        found.held_out = Fixed(drifts)
        return found

    drifts = [0.0, 0.1 / 3, 0.2 / 7, 0.3 / 11, 0.01, 0.02]
    whole, first, second = budgets(drifts), budgets(drifts[:3]), budgets(drifts[3:])
    for step in range(10):
        whole.begin(step)
        whole.begin(step)  # as every micro-batch does
    for step in range(5):
        first.begin(step)
    second.load(json.loads(json.dumps(first.state())))
    second.begin(4)  # the step that it was saved in
    for step in range(5, 10):
        second.begin(step)
    assert second.state() == whole.state()
    assert whole.acting[1] is made[1]


# --- inside a session -------------------------------------------------------------------------------------------------


def steps(session, student, batches):
    """Run some steps of plain descent; return what is logged of each."""
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.3)
    logged = []
    for batch in batches:
        loss = student(**batch).loss + session.loss(batch)
        loss.backward()
        session.gradients_ready()
        optimizer.step()
        optimizer.zero_grad()
        logged.append(session.pop_metrics())
    return logged


@pytest.mark.parametrize("cls", [FullKL, TargetMaskedKL, SelfReplay, UpdateDecay, L2SP, EWC])
def test_what_acts_has_the_strength_that_is_logged(cls):
    """The method's own loss or penalty, in the very step: strength times what a method of strength 1 would add."""
    student = tiny.lora(tiny.llama())
    made = cls(strength="auto", budget=1e-3, budget_every=2)
    kept = {"retain": {"alignment": tiny.batches(20, size=2, seed=4), "task": tiny.batches(20, size=2, seed=5)}}
    with session_of(student, [made, cls(strength=1.0)], **kept) as session:
        logged = steps(session, student, tiny.batches(6, size=4))
    quantity = "loss" if issubclass(cls, OutputMethod) else "penalty"
    found, unit = ([row[f"holdfast/{cls.name}{twin}/{quantity}"] for row in logged] for twin in ("", ".2"))
    strengths = [row[f"holdfast/{cls.name}/strength"] for row in logged]
    assert found == pytest.approx([s * one for s, one in zip(strengths, unit, strict=True)], rel=1e-5)
    assert strengths[0] == strengths[1] == 0
    assert 0 < strengths[2] == strengths[3] != strengths[4] == strengths[5]
    drifts = [row[f"holdfast/{cls.name}/drift"] for row in logged]
    assert drifts[0] == drifts[1] == 0 < drifts[2] == drifts[3]
    over = [row[f"holdfast/{cls.name}/over_budget"] for row in logged]
    assert over == [float(drift > 1e-3) for drift in drifts]
    assert over[-1] == 1.0


def test_two_budgets_are_each_their_own_on_one_measure():
    student = tiny.lora(tiny.llama())
    made = [
        FullKL(strength="auto", budget=1e-3, budget_every=1),
        UpdateDecay(strength="auto", budget=5.0, budget_every=3),
    ]
    with session_of(student, made) as session:
        logged = steps(session, student, tiny.batches(8, size=4))
        told = session.explain()
    for row in logged[::3]:
        assert row["holdfast/full_kl/drift"] == row["holdfast/update_decay/drift"]
    tight, loose = logged[-1]["holdfast/full_kl/strength"], logged[-1]["holdfast/update_decay/strength"]
    assert tight > 0.3
    assert 0 < loose < 1e-4
    assert "full_kl (at most 0.001, every 1 steps), update_decay (at most 5, every 3 steps)" in told


def test_a_plain_loop_resumes_to_the_last_bit(tmp_path):
    def fresh():
        model = tiny.lora(tiny.llama(), init_lora_weights="pissa")
        return model, [SelfReplay(strength="auto", budget=1e-3, budget_every=2), L2SP(**AUTO)]

    rows = tiny.batches(9, size=4)
    whole, made = fresh()
    with session_of(whole, made) as session:
        expected = steps(session, whole, rows)
    for cut in (4, 5):  # where it is measured next, and not
        first, made = fresh()
        with session_of(first, made) as session:
            steps(session, first, rows[:cut])
            session.save(tmp_path)
        second, made = fresh()
        with session_of(second, made) as session:
            session.load(tmp_path)
            second.load_state_dict(first.state_dict())
            logged = steps(session, second, rows[cut:])
        assert runs.identical(second, whole)
        assert logged == expected[cut:]
    with session_of(fresh()[0], [SelfReplay(strength="auto", budget=0.5, budget_every=2), L2SP(**AUTO)]) as session:
        with pytest.raises(WrongSetup, match="other methods or settings"):
            session.load(tmp_path)


def test_a_run_that_goes_on_must_be_measured_on_the_same_sequences(tmp_path):
    made = [UpdateDecay(**AUTO)]
    with session_of(tiny.lora(tiny.llama()), made) as session:
        session.save(tmp_path)
    with session_of(tiny.lora(tiny.llama()), made, retain=tiny.batches(20, size=2, seed=6)) as session:
        with pytest.raises(WrongSetup, match="measured its drift on other retain sequences"):
            session.load(tmp_path)


def test_a_method_without_a_strength_of_its_own_has_the_unit_1():
    @dataclass(frozen=True, kw_only=True)
    class Off(WeightMethod):
        strength: float = 0.0

        def penalty(self, state, weights):
            return self.strength * sum(p.square().sum() for p in weights.params.values())

    assert unit_of(Off(**AUTO)) == 1.0
    assert {unit_of(cls(**AUTO)) for cls in (FullKL, UpdateDecay)} == {0.3, 1e-3}


# --- a measure of the user's ------------------------------------------------------------------------------------------


def test_a_budget_on_a_measure_of_the_users_follows_it_and_needs_no_retain_data():
    """The squared norm of the update, measured twice as often as the other; nothing else is needed or touched."""
    student, seen = tiny.lora(tiny.llama(attention_dropout=0.2)), []

    def norm(model):
        assert model is student
        assert not torch.is_grad_enabled()
        assert not model.training
        seen.append(sum(p.square().sum().item() for name, p in model.named_parameters() if "lora_B" in name))
        return seen[-1]

    made = [UpdateDecay(strength="auto", budget={"norm": 1e-3}, budget_every=2)]
    with session_of(student, made, retain=(), measures={"norm": norm}) as session:
        assert session.tap is None
        assert session.reference is None
        logged = steps(session, student, tiny.batches(6, size=4))
        told = session.explain()
    assert len(seen) == 3
    assert [row["holdfast/update_decay/drift"] for row in logged] == pytest.approx([x for x in seen for _ in "ab"])
    expected = followed(1e-3, 1e-3, seen)
    assert [row["holdfast/update_decay/strength"] for row in logged[::2]] == pytest.approx(expected, rel=1e-6)
    assert expected[-1] > 0
    assert "drift measured: norm; strength follows: update_decay (at most 0.001, every 2 steps)" in told


def test_a_measure_leaves_the_run_as_it_was():
    def weights(measures):
        student, made = tiny.lora(tiny.llama(attention_dropout=0.2), lora_dropout=0.2), [L2SP(strength=1.0)]
        if measures:
            made.append(UpdateDecay(strength="auto", budget={"nothing": 1.0}))
        with session_of(student, made, measures=measures) as session:
            steps(session, student, tiny.batches(6, size=4))
        return student

    def nothing(model):
        torch.manual_seed(5)
        return -torch.rand(1).item()  # what has been gained is no drift

    assert runs.identical(weights({"nothing": nothing}), weights({}))


def test_a_measure_and_the_kl_side_by_side():
    student = tiny.lora(tiny.llama())
    made = [FullKL(**AUTO), UpdateDecay(strength="auto", budget={"steps": 0.5})]
    with session_of(student, made, measures={"steps": lambda model: 0.25}) as session:
        logged = steps(session, student, tiny.batches(6, size=4))
        told = session.explain()
    assert {row["holdfast/update_decay/drift"] for row in logged} == {0.25}
    assert 0.25 != logged[-1]["holdfast/full_kl/drift"] > 0
    assert "base: the base model: adapter switched off); strength follows: full_kl (at most 0.02" in told


def test_a_measure_that_is_not_given_is_refused():
    made = [UpdateDecay(strength="auto", budget={"norm": 1e-3})]
    with pytest.raises(WrongSetup, match=r"budget on 'norm', and no such measure was given \(other\)"):
        session_of(tiny.lora(tiny.llama()), made, measures={"other": lambda model: 0.0}).__enter__()


def test_every_has_a_default_and_defaults_do_nothing():
    assert FullKL().budget_every == EVERY
    assert hash(FullKL(**AUTO)) == hash(FullKL(**AUTO))
    named = FullKL(strength="auto", budget={"refusal_margin": 0.01})
    assert replace(named) == named
    assert hash(replace(named)) == hash(named)
    assert "budget=('refusal_margin', 0.01)" in named.describe()
