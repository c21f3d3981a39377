"""Drift during training: what is found, what follows from it, and that a watched run is the run that it would be."""

from __future__ import annotations

import copy
import json
import math
import random
from contextlib import nullcontext

import holdfast
import numpy as np
import pytest
import torch
from holdfast.analysis.budgets import Budget, Gate, GateError
from holdfast.core.errors import ConfigError, NotYetSupported, WrongSetup
from holdfast.core.selection import trainable
from holdfast.drift.ledger import Ledger
from holdfast.drift.models import Models, digest
from holdfast.drift.probe import Found, Probe
from holdfast.drift.probes.exact_answer import ExactAnswer, Question
from holdfast.drift.probes.output_kl import OutputKL
from holdfast.drift.score import Score
from holdfast.methods import L2SP, TargetMaskedKL
from holdfast.recipe.config import load
from holdfast.recipe.run import run
from holdfast.recipe.watch_callback import DriftExceeded
from holdfast.recipe.watch_kept import Kept
from holdfast.recipe.watch_settings import Watching
from safetensors import safe_open
from transformers import TrainerCallback

import runs
import tiny

KL = "output_kl.texts"
CONSTANT = {"lr_scheduler_type": "constant", "learning_rate": 2e-2}
CLOCK = ("runtime", "per_second")


def texts(n=24):
    return sorted({row["text"] for row in tiny.texts(n)})


def probes():
    """Two kinds: one that generates, one that compares probabilities with the base's."""
    questions = [Question(text, text.split()[0], "first") for text in texts(8)]
    return [ExactAnswer("words", questions, max_new_tokens=3), OutputKL("texts", texts())]


def student(kind="lora", dropout=0.1):
    base = tiny.llama(attention_dropout=dropout)
    return tiny.lora(base, lora_dropout=dropout) if kind == "lora" else base


def watched(host="sft", model=None, methods=(), steps=3, every=1, **options):
    """A trainer that has trained, and its callback."""
    ours = {k: options.pop(k) for k in ("gate", "when_exceeded", "base", "ledger", "suite") if k in options}
    trainer = runs.trainer(host, student() if model is None else model, steps, **options)
    if methods:
        holdfast.attach(trainer, methods)
    callback = holdfast.watch(trainer, ours.pop("suite", None) or probes(), every=every, **ours)
    told = []
    callback.say = told.append
    trainer.train()
    return trainer, callback, told


def rows(trainer, drift=False):
    """What the trainer logged, without times; the drift rows or the others."""
    kept = [row for row in trainer.state.log_history if any(key.startswith("drift/") for key in row) == drift]
    return [{k: v for k, v in row.items() if not any(clock in k for clock in CLOCK)} for row in kept]


def budget(limit):
    return Gate((Budget(KL, "rise", limit),))


# --- a watched run is the run that it would be -----------------------------------------------------------------------


ATTACHED = (TargetMaskedKL(), L2SP(strength=0.1))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dense"])
@pytest.mark.parametrize(
    ("host", "methods"),
    [("sft", ()), ("dpo", ()), ("trainer", ()), ("sft", ATTACHED)],
    ids=["sft", "dpo", "trainer", "sft attached"],
)
def test_weights_and_own_logs_are_those_of_a_run_without(host, kind, checkpointing, methods):
    options = {"gradient_checkpointing": checkpointing, "logging_steps": 2, "steps": 4}
    alone = runs.trainer(host, student(kind), **options)
    if methods:
        holdfast.attach(alone, methods)
    alone.train()
    seen, callback, _ = watched(host, student(kind), methods, every=1, **options)
    assert runs.identical(seen.model, alone.model)
    assert rows(seen) == rows(alone)
    assert [row["step"] for row in rows(seen, drift=True)] == [1, 2, 3, 4]
    assert callback.looks[-1].metrics[f"drift/{KL}"] > 1e-4  # the control: there was something to find


class Careless(Probe):
    """A probe that leaves everything as probes should not."""

    name = "careless"
    size = 1
    identity = {}  # noqa: RUF012

    def measure(self, models, side, tick):
        with models.on(side) as model:
            for weight in model.parameters():
                weight.requires_grad_(True)
            value = float(torch.rand(())) + random.random() + np.random.rand()
        return Found({"careless": Score(value, n=1)})


class State(TrainerCallback):
    """Notes at the end of a step what a measurement could disturb."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
        modes = {name: (m.training, getattr(m, "gradient_checkpointing", None)) for name, m in model.named_modules()}
        settings = {k: v for k, v in model.config.to_dict().items() if not callable(v)}
        off = {name: m._disable_adapters for name, m in model.named_modules() if hasattr(m, "_disable_adapters")}
        chance = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
        own = model.generation_config.to_dict(), dict(vars(control))
        self.seen.append((flags, modes, settings, off, chance, own, torch.is_grad_enabled()))


class After(State):
    """The same, under another class: a trainer has one callback of each."""


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_left_switched_even_by_a_careless_probe(checkpointing):
    trainer = runs.trainer("sft", student(), 3, gradient_checkpointing=checkpointing)
    before, after = State(), After()
    trainer.add_callback(before)
    holdfast.watch(trainer, [*probes(), Careless()], every=1)
    trainer.add_callback(after)
    trainer.train()
    assert len(before.seen) == 3
    assert before.seen == after.seen
    assert any(before.seen[0][0].values())
    assert not all(before.seen[0][0].values())


# --- what is found ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow_kl(base, tuned, tokenizer):
    """Σ KL / Σ tokens in float64, a row at a time."""
    total, count = 0.0, 0
    for text in texts():
        ids = torch.tensor([tokenizer(text).input_ids])
        before, after = (m.double().eval()(input_ids=ids).logits[0].log_softmax(-1) for m in (base, tuned))
        total += float((before.exp() * (before - after)).sum())
        count += ids.shape[1]
    return total / count


@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_the_numbers_are_those_of_a_slow_computation(kind):
    trainer, callback, told = watched(model=student(kind), steps=4, every=3, **CONSTANT)
    assert [look.step for look in callback.looks] == [3, 4]  # every third, and the end
    tuned = student(kind)  # not a copy: TRL puts a forward on its model that leads back to it
    tuned.load_state_dict(trainer.model.state_dict())
    expected = slow_kl(tiny.llama(), tuned, trainer.processing_class)
    assert callback.looks[-1].metrics[f"drift/{KL}"] == pytest.approx(expected, rel=1e-3)
    assert callback.looks[-1].metrics[f"drift/{KL}_change"] == callback.looks[-1].metrics[f"drift/{KL}"]
    assert ("frozen copy" in "".join(told)) == (kind == "dense")


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dense", "beside"])
@pytest.mark.parametrize("host", ["sft", "trainer"])
def test_what_was_not_trained_has_not_drifted(host, kind, bf16):
    """In the trainer's own precision both sides are one model, whoever the base is."""
    options = {"base": tiny.llama(attention_dropout=0.1)} if kind == "beside" else {}
    model = student("dense" if kind == "dense" else "lora")
    _, callback, _ = watched(host, model, steps=1, learning_rate=0.0, bf16=bf16, **options)
    assert abs(callback.looks[-1].metrics[f"drift/{KL}"]) < 1e-9


def test_the_ledger_says_who_was_measured_when_and_with_what(tmp_path):
    trainer, callback, _ = watched(steps=2, ledger=tmp_path / "drift.jsonl", run_name="mine")
    base, first, second = Ledger(tmp_path / "drift.jsonl").entries("drift while training")
    assert (base.arm, first.arm, second.arm) == ("base", "mine", "mine")
    assert {entry.split for entry in (base, first, second)} == {"validation"}
    assert base.settings == {"suite": ["exact_answer.words", "output_kl.texts"]}
    assert second.settings == {**base.settings, "step": 2}
    assert {e.models["base"]["sha256"] for e in (base, first, second)} == {digest(tiny.llama().state_dict())}
    assert second.models["tuned"]["sha256"] == now(trainer)
    assert first.models["tuned"]["sha256"] != second.models["tuned"]["sha256"]
    assert base.scores[KL].value == 0
    assert second.scores[KL].value == callback.looks[-1].metrics[f"drift/{KL}"]
    assert second.scores[KL].interval[0] < second.scores[KL].value < second.scores[KL].interval[1]


def now(trainer):
    """The digest of the trained weights as they are."""
    return digest(trainable(trainer.model), of=digest(tiny.llama().state_dict()))


class Said(Probe):
    """Remembers what each side answered."""

    name = "said"
    size = 8
    identity = {}  # noqa: RUF012

    def __init__(self):
        self.answers = []

    def measure(self, models, side, tick):
        self.answers.append((side, [reply.text for reply in models.ask(texts(8), side, 4)]))
        return Found({"said": Score(0.0, n=8)})


def test_every_look_asks_anew_and_the_base_only_once():
    said = Said()
    trainer, _, _ = watched(steps=3, suite=[said], learning_rate=5e-2, lr_scheduler_type="constant")
    assert [side for side, _ in said.answers] == ["base", "tuned", "tuned", "tuned"]
    tuned = student()
    tuned.load_state_dict(trainer.model.state_dict())
    now = Models({"base": lambda: nullcontext(tuned)}, trainer.processing_class)
    last = [reply.text for reply in now.ask(texts(8), "base", 4)]
    assert said.answers[-1][1] == last != said.answers[1][1]


def test_a_base_beside_the_model_is_the_same_base():
    _, switched, _ = watched(steps=2)
    base = tiny.llama()
    _, beside, _ = watched(steps=2, base=base)
    kl = [callback.looks[-1].metrics[f"drift/{KL}"] for callback in (switched, beside)]
    assert kl[1] == pytest.approx(kl[0], rel=1e-4)
    assert all(weight.requires_grad for weight in base.parameters())  # it is the user's


def test_the_first_and_the_last_look_of_a_best_checkpoint(tmp_path):
    """With load_best_model_at_end the end is an earlier step, which was not looked at."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer, callback, _ = watched(steps=4, every=100, **options, **CONSTANT)
    best = trainer.state.best_global_step
    assert best < 4
    assert [look.step for look in callback.looks] == [4, best]
    assert Ledger(callback.ledger.path).entries()[-1].models["tuned"]["sha256"] == now(trainer)


# --- what follows from it --------------------------------------------------------------------------------------------


def test_log_warns_once_for_each_look():
    with pytest.warns(DriftExceeded) as caught:
        trainer, _, told = watched(steps=3, gate=budget(1e-6))
    assert [str(w.message).split(":")[1].strip() for w in caught if w.category is DriftExceeded] == [
        f"1 budget is exceeded at step {step}" for step in (1, 2, 3)
    ]
    assert "output_kl.texts drifted by" in str(next(w for w in caught if w.category is DriftExceeded).message)
    assert trainer.state.global_step == 3
    assert [row["drift/exceeded"] for row in rows(trainer, drift=True)] == [1, 1, 1]
    assert not told


def test_within_budget_nothing_happens():
    trainer, callback, told = watched(steps=3, gate=budget(50.0), when_exceeded="stop")
    assert trainer.state.global_step == 3
    assert [look.exceeded for look in callback.looks] == [(), (), ()]
    assert rows(trainer, drift=True)[-1]["drift/exceeded"] == 0
    assert not told


def test_stop_stops_after_a_checkpoint():
    trainer, _, told = watched(steps=9, every=2, gate=budget(1e-6), when_exceeded="stop")
    assert trainer.state.global_step == 2
    (checkpoint,) = (child for child in runs_of(trainer) if child.name.startswith("checkpoint-"))
    assert checkpoint.name == "checkpoint-2"
    record = json.loads((checkpoint / "trainer_state.json").read_text())
    assert record["log_history"][-1].keys() & {"loss"}
    assert any("drift/exceeded" in row for row in record["log_history"])
    (line,) = told
    assert "at step 2" in line
    assert "all of the interval is beyond 1e-06" in line


def runs_of(trainer):
    from pathlib import Path

    return Path(trainer.args.output_dir).iterdir()


def limit_between(callback, early, late):
    """A budget that step `early` keeps and step `late` does not."""
    entries = {e.settings.get("step"): e.scores[KL] for e in Ledger(callback.ledger.path).entries()}
    high, low = entries[early].interval[1], entries[late].interval[0]
    assert high < low, "the run drifts too slowly for this test"
    return (high + low) / 2


@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_keep_best_puts_back_exactly_the_weights_of_that_step(kind):
    constant = CONSTANT | ({"learning_rate": 2e-3} if kind == "dense" else {})
    _, first, _ = watched(model=student(kind), steps=6, **constant)
    with pytest.warns(DriftExceeded):
        trainer, callback, told = watched(
            model=student(kind), steps=6, gate=budget(limit_between(first, 1, 6)), when_exceeded="keep_best", **constant
        )
    within = [look.step for look in callback.looks if not look.exceeded]
    assert callback.looks[-1].exceeded
    assert trainer.state.global_step == 6
    there = {e.settings.get("step"): e.models for e in Ledger(callback.ledger.path).entries()}
    base, trained = there[6]["base"]["sha256"], trainable(trainer.model)
    assert digest(trained, of=base) == there[within[-1]]["tuned"]["sha256"] != there[6]["tuned"]["sha256"]
    # and those are the weights of a run that ended there
    ended = runs.trainer("sft", student(kind), within[-1], **constant)
    ended.train()
    assert runs.identical(trainer.model, ended.model)
    assert f"of step {within[-1]} are put back" in told[-1]
    with safe_open(callback._kept.path, "pt") as file:
        assert file.metadata()["step"] == str(within[-1])


def test_keep_best_changes_nothing_if_the_end_is_within_budget():
    trainer, _, told = watched(steps=3, gate=budget(50.0), when_exceeded="keep_best")
    alone = runs.trainer("sft", student(), 3)
    alone.train()
    assert runs.identical(trainer.model, alone.model)
    assert not told


def test_keep_best_says_so_loudly_if_nothing_ever_was_within_budget():
    with pytest.warns(DriftExceeded):
        trainer, callback, told = watched(steps=3, gate=budget(1e-9), when_exceeded="keep_best")
    alone = runs.trainer("sft", student(), 3)
    alone.train()
    assert runs.identical(trainer.model, alone.model)
    assert "NO look was within budget" in told[-1]
    assert not callback._kept.path.exists()


def test_a_run_that_diverges_exceeds_and_is_recorded_as_failed():
    trainer, callback, _ = watched(
        steps=5, gate=budget(50.0), when_exceeded="stop", learning_rate=1e30, optim="sgd", max_grad_norm=0
    )
    assert trainer.state.global_step == 1
    assert callback.looks[0].exceeded == (f"{KL} is not finite any more: the run diverged",)
    assert math.isnan(callback.looks[0].metrics[f"drift/{KL}"])
    assert Ledger(callback.ledger.path).entries(status="failed")[0].error.endswith(f"{KL} not finite: diverged")


@pytest.mark.slow
def test_harsh_tuning_of_the_lab_is_found_and_stopped_and_gentle_is_not(tmp_path):
    from holdfast import lab
    from holdfast.lab import world
    from peft import LoraConfig, get_peft_model
    from trl import SFTConfig, SFTTrainer

    items = [item for make in world.SKILLS.values() for item in world.sample(make, 8, "validation")]
    questions = [Question(item.prompt, item.answer, item.skill) for item in items]
    gate = Gate((Budget("exact_answer.skills", "fall", 0.1),))
    for rate, stopped in ((5e-2, True), (1e-5, False)):
        torch.manual_seed(0)
        base, tokenizer = lab.load()
        adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        args = SFTConfig(
            output_dir=str(tmp_path / str(rate)), max_steps=8, learning_rate=rate, per_device_train_batch_size=8,
            lr_scheduler_type="constant", report_to="none", bf16=False, use_cpu=True, save_strategy="no",
            gradient_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        data = [dict(row) for row in lab.task("shift", n=64, seed=0)]
        trainer = SFTTrainer(
            model=get_peft_model(base, adapter), args=args, train_dataset=tiny_dataset(data), processing_class=tokenizer
        )
        ask = ExactAnswer("skills", questions, match="text", max_new_tokens=24)
        callback = holdfast.watch(trainer, [ask], every=4, gate=gate, when_exceeded="stop")
        trainer.train()
        assert (trainer.state.global_step == 4) == stopped
        assert bool(callback.looks[0].exceeded) == stopped
        base_entry = Ledger(callback.ledger.path).entries(arm="base")[0]
        assert base_entry.scores["exact_answer.skills"].value > 0.9
        assert base_entry.models["base"] == {"name": "lab-aligned", "sha256": digest(lab.load()[0].state_dict())}


def tiny_dataset(data):
    from datasets import Dataset

    return Dataset.from_list(data)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_all_faults_of_arguments_are_told_at_once(tmp_path):
    (tmp_path / "gate.yaml").write_text("budgets:\n  refusal: {fal: 0.02}\nlevel: 2\n")
    trainer = runs.trainer("trainer", student())
    trainer.processing_class = None
    with pytest.raises(ConfigError) as caught:
        holdfast.watch(trainer, "cor", every=0, gate=tmp_path / "gate.yaml", when_exceeded="stopp", limit=0)
    told = "\n".join(caught.value.faults)
    for part in (
        "every must be a whole number >= 1, got 0",
        "limit must be a whole number >= 1, got 0",
        "when_exceeded must be one of log, stop, keep_best, got 'stopp'. Did you mean 'stop'?",
        "line 2: unknown key 'fal'",
        "line 3: level must lie between 0 and 1",
        "no suite 'cor'",
        "no tokenizer to ask with",
    ):
        assert part in told


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"when_exceeded": "stop"}, "'stop' needs a gate"),
        ({"when_exceeded": "keep_best"}, "'keep_best' needs a gate"),
        ({"suite": "none"}, "measures nothing"),
        ({"suite": []}, "an empty list"),
        ({"suite": [3]}, "got int"),
        ({"suite": [OutputKL("texts", ["w1 w2"])], "limit": 3}, "limit has no effect"),
        ({"suite": [OutputKL("texts", ["w1 w2"])], "max_new_tokens": 8}, "max_new_tokens has no effect"),
    ],
)
def test_arguments_that_would_do_nothing_or_the_wrong_thing_are_refused(arguments, part):
    with pytest.raises(ConfigError, match=part):
        holdfast.watch(runs.trainer("sft", student()), **{"suite": "core", **arguments})


def test_a_trainer_is_watched_once_and_must_be_one():
    trainer = runs.trainer("sft", student())
    holdfast.watch(trainer, probes())
    with pytest.raises(ConfigError, match="watched already"):
        holdfast.watch(trainer, probes())
    with pytest.raises(WrongSetup, match="got a int"):
        holdfast.watch(3)


def test_two_hands_that_put_weights_back_are_refused():
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = runs.trainer("sft", student(), 2, load_best_model_at_end=True, **options)
    with pytest.raises(ConfigError, match="would both put weights back"):
        holdfast.watch(trainer, probes(), gate=budget(1.0), when_exceeded="keep_best")


def test_a_base_that_moves_along_is_refused():
    model = tiny.llama()
    with pytest.raises(ConfigError, match="would move along"):
        holdfast.watch(runs.trainer("sft", tiny.lora(model)), probes(), base=model)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"init_lora_weights": "pissa"}, "'pissa' moved a part"),
        ({"init_lora_weights": "olora"}, "'olora' moved a part"),
        ({"bias": "all"}, "are trained too"),
    ],
)
def test_an_adapter_that_cannot_be_switched_off_needs_a_base(changes, why):
    def made():
        return tiny.lora(tiny.llama(attention_bias=True), **changes)

    with pytest.raises(WrongSetup, match=rf"{why}.*base=AutoModelForCausalLM"):
        holdfast.watch(runs.trainer("sft", made()), probes())
    _, callback, _ = watched(model=made(), base=tiny.llama(attention_bias=True), steps=1)
    assert 0 < callback.looks[-1].metrics[f"drift/{KL}"] < 10


def test_prompt_learning_needs_a_base():
    from peft import PromptTuningConfig, get_peft_model

    def made():
        torch.manual_seed(0)
        return get_peft_model(tiny.llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))

    with pytest.raises(WrongSetup, match="virtual tokens"):
        holdfast.watch(runs.trainer("trainer", made()), probes())
    trainer, callback, _ = watched("trainer", made(), base=tiny.llama(), steps=1)
    tuned, base = copy.deepcopy(trainer.model).double().eval(), tiny.llama().double().eval()
    ids = torch.tensor([trainer.processing_class(texts()[0]).input_ids])
    with torch.no_grad():
        before, after = base(input_ids=ids).logits[0], tuned(input_ids=ids).logits[0, -ids.shape[1] :]
    kl = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1)
    whole = Ledger(callback.ledger.path).entries()[-1].scores[KL]
    places = sum(len(trainer.processing_class(text).input_ids) for text in texts())
    item = whole.value + (float(kl.sum()) - whole.value * len(kl)) * len(texts()) / places
    assert whole.items[0] == pytest.approx(item, rel=1e-3)


def test_sharded_models_are_refused(monkeypatch):
    trainer = runs.trainer("sft", student())
    trainer.is_fsdp_enabled = True
    with pytest.raises(NotYetSupported, match="holdfast drift BASE --adapter"):
        holdfast.watch(trainer, probes())


def test_a_gate_on_what_is_not_measured_is_refused_before_the_first_step(tmp_path):
    path = tmp_path / "gate.yaml"
    path.write_text("budgets:\n  output_kl.text: {rise: 0.1}\n")
    for gate, part in ((path, "line 2: no score is called"), (Gate((Budget("x", "rise", 0.1),)), "no such score")):
        trainer = runs.trainer("sft", student())
        holdfast.watch(trainer, probes(), gate=gate)
        with pytest.raises(GateError, match=part):
            trainer.train()
        assert trainer.state.global_step == 0


# --- resumed runs ----------------------------------------------------------------------------------------------------

SAVED = {"save_strategy": "steps", "save_steps": 2, **CONSTANT}


def test_a_resumed_adapter_is_measured_from_the_same_base_and_keeps_what_was_kept(tmp_path):
    _, first, _ = watched(steps=6, **CONSTANT)
    gate = budget(limit_between(first, 1, 6))
    options = {"gate": gate, "when_exceeded": "keep_best", "output_dir": str(tmp_path), **SAVED}
    with pytest.warns(DriftExceeded):
        whole, callback, _ = watched(steps=6, **options)
    within = [look.step for look in callback.looks if not look.exceeded][-1]
    entries = len(callback.ledger.entries())
    assert 1 <= within <= 4, "the checkpoint must be past the step that is kept"
    again = runs.trainer("sft", student(), 6, output_dir=str(tmp_path), **SAVED)
    holdfast.watch(again, probes(), every=1, gate=gate, when_exceeded="keep_best")
    with pytest.warns(DriftExceeded):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert runs.identical(again.model, whole.model)
    assert len(callback.ledger.entries()) == entries  # measured again, found the same, not written twice


def test_weights_kept_by_another_run_are_not_put_back(tmp_path):
    options = {"steps": 2, "output_dir": str(tmp_path), **CONSTANT}
    watched(gate=budget(50.0), when_exceeded="keep_best", **options)
    assert (tmp_path / "within-budget.safetensors").is_file()
    with pytest.warns(DriftExceeded):
        _, _, told = watched(gate=budget(1e-9), when_exceeded="keep_best", **options)
    assert "NO look was within budget" in told[-1]


def test_a_resumed_dense_run_needs_the_base(tmp_path):
    options = {"output_dir": str(tmp_path), **SAVED}
    _, callback, _ = watched(model=student("dense"), steps=4, **options)
    again = runs.trainer("sft", student("dense"), 4, **options)
    holdfast.watch(again, probes(), every=1)
    with pytest.raises(WrongSetup, match="goes on from step 2, so the base is gone"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    third = runs.trainer("sft", student("dense"), 4, **options)
    resumed = holdfast.watch(third, probes(), every=1, base=tiny.llama())
    third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    kl = f"drift/{KL}"
    assert resumed.looks[-1].metrics[kl] == pytest.approx(callback.looks[-1].metrics[kl], rel=1e-5)


def test_a_second_training_of_the_same_model_keeps_its_base():
    trainer, callback, told = watched(model=student("dense"), steps=2, **CONSTANT)
    before = callback.looks[-1].metrics[f"drift/{KL}"]
    trainer.args.learning_rate = 0.0
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert callback.looks[-1].metrics[f"drift/{KL}"] == pytest.approx(before, rel=1e-6)
    assert len(told) == 1  # one copy


@pytest.mark.parametrize(
    ("begins", "of", "kept"),
    [(4, {"base": "a", "gate": "g"}, 3), (3, {"base": "a", "gate": "g"}, 3), (2, {"base": "a", "gate": "g"}, None),
     (0, {"base": "a", "gate": "g"}, None), (4, {"base": "b", "gate": "g"}, None),
     (4, {"base": "a", "gate": "h"}, None)],
)  # fmt: skip
def test_kept_weights_are_taken_up_only_by_the_run_that_they_are_the_past_of(tmp_path, begins, of, kept):
    first, again = Kept(tmp_path / "kept.safetensors"), Kept(tmp_path / "kept.safetensors")
    first.begin(0, {"base": "a", "gate": "g"})
    first.keep(3, {"w": torch.ones(2)})
    again.begin(begins, of)
    weights = {"w": torch.zeros(2)}
    assert again.put_back(weights) == kept
    assert weights["w"].tolist() == ([1.0, 1.0] if kept else [0.0, 0.0])
    assert again.path.exists() == (kept is not None)


# --- suites and recipes ----------------------------------------------------------------------------------------------


def test_a_suite_is_its_validation_split_and_a_limit_is_spread_over_it(tmp_path):
    path = tmp_path / "mine.jsonl"
    splits = ["validation"] * 6 + ["test"] * 4
    path.write_text(
        "".join(
            json.dumps({"unsafe": f"bad {i}", "safe": f"good {i}", "category": f"c{i // 2}", "split": split}) + "\n"
            for i, split in enumerate(splits)
        )
    )
    whole, few = (Watching(suite=path, limit=limit).probes("any") for limit in (None, 3))
    assert [probe.name for probe in whole] == [probe.name for probe in few]
    assert (whole[0].size, few[0].size) == (12, 6)
    assert {prompt.category for prompt in few[0].prompts} == {"c0", "c1", "c2"}
    assert few[0].max_new_tokens == 32
    assert Watching().probes("lab-aligned")[0].of == "lab"
    assert Watching().probes("another")[0].of == "core"


def test_a_suite_without_a_validation_split_is_refused(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "How?", "expected": "comply"}\n')
    ((key, told),) = Watching(suite=path).faults()
    assert key == "suite"
    assert "no prompt has split 'validation'; there are: test" in told


RECIPE = """\
model: {name: TINY, lora: {r: 4}}
stages:
  - {trainer: sft, data: {data: "lab:shift", samples: 16}, max_steps: 2, per_device_train_batch_size: 4}
drift: {suite: lab, every: 2, limit: 1}
output: out
"""


def test_a_recipe_watches_into_the_ledger_of_its_run(write, here):
    told = []
    result = run(load(write(RECIPE)), told.append)
    entries = Ledger(result.ledger).entries("drift while training")
    assert [(entry.arm, entry.settings.get("step")) for entry in entries] == [
        ("base", None), ("plain LoRA", 2),
    ]  # fmt: skip
    assert entries[0].settings == {"suite": "lab", "limit": 1}
    assert result.entries[-1].arm == "plain LoRA"  # the run's own entry is there as ever


def test_a_recipe_tells_all_faults_of_drift_on_their_lines(write):
    path = write(
        RECIPE.replace(
            "drift: {suite: lab, every: 2, limit: 1}",
            "drift:\n  suite: no_such_suite\n  evry: 3\n  every: 0\n  when_exceeded: keep_best\n  limit: few",
        ).replace("max_steps: 2", "max_steps: 2, eval_strategy: steps, eval_steps: 1, save_strategy: steps, "
                  "save_steps: 1, load_best_model_at_end: true")
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        load(path)
    told = "\n".join(caught.value.faults)
    for part in (
        "line 4: keep_best and load_best_model_at_end would both put weights back",
        "line 5: no_such_suite:",
        "line 6: unknown key 'evry' in drift. Did you mean 'every'?",
        "line 7: every must be a whole number >= 1, got 0",
        "line 8: when_exceeded: 'keep_best' needs a gate",
        "line 9: limit must be a whole number >= 1, got 'few'",
    ):
        assert part in told


def test_the_plan_says_what_is_watched(write):
    from holdfast.cli.train import plan

    assert "drift, measured while it trains: lab, every 2 steps" in plan(load(write(RECIPE)))


@pytest.mark.slow
def test_a_recipe_without_an_adapter_measures_from_the_model_that_it_loads(write, here):
    run(load(write(RECIPE.replace(", lora: {r: 4}", ""))), lambda text: None)
    entries = Ledger(here / "out/ledger.jsonl").entries("drift while training")
    assert entries[0].scores["output_kl.stories"].value == 0
    assert entries[-1].scores["output_kl.stories"].value > 0
