"""A budget on drift in real trainings: it is met, it does nothing where it is loose, and hosts change nothing of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import holdfast
import pytest
import torch
from holdfast import lab
from holdfast.core.errors import ConfigError
from holdfast.integrations.retain_data import to_batches
from holdfast.methods import L2SP, FullKL, SelfReplay, TargetMaskedKL, UpdateDecay
from peft import LoraConfig, get_peft_model

import runs
import tiny

BAR = 1e-5  # float32 runs, as in test_invariance
SGD = {"optim": "sgd", "learning_rate": 0.5, "steps": 7}
TIGHT = {"strength": "auto", "budget": 1e-3, "budget_every": 2}
KEYS = ("strength", "drift", "over_budget")


def logged(trainer, name):
    rows = [row for row in trainer.state.log_history if f"holdfast/{name}/strength" in row]
    return [[row[f"holdfast/{name}/{key}"] for key in KEYS] for row in rows]


# --- in the lab: the budget is met ------------------------------------------------------------------------------------

STEPS, SEED, BUDGET = 80, 3, 0.1


@pytest.fixture(scope="module")
def world():
    """The task's rows, tokenised, and retain rows for the budget."""
    tokenizer = lab.load("lab-aligned")[1]
    return {
        "batches": {
            n: to_batches(lab.task("shift", n=n * STEPS, seed=SEED), tokenizer, batch_size=n) for n in (12, 16)
        },
        "retain": to_batches(lab.retain(256, seed=1000 + SEED), tokenizer),
    }


def trained(world, made, size=16):
    """Train an adapter; return it, the sequences that were measured, what was logged, and the last task loss.

    The rate falls linearly to 0, as a trainer's does where nothing is said.
    """
    torch.manual_seed(SEED)
    base, tokenizer = lab.load("lab-aligned")
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses, rows = torch.optim.AdamW(weights, 4e-3, weight_decay=0), [], []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 5) * (1 - step / STEPS))
    with holdfast.preserve(model, optimizer, made, retain=world["retain"], tokenizer=tokenizer, seed=SEED) as session:
        for batch in world["batches"][size]:
            task = model(**batch).loss
            (task + session.loss(batch)).backward()
            session.gradients_ready()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(task.item())
            rows.append(session.pop_metrics())
        held = session.budgets.held_out.sequences if session.budgets.held_out else []
    return model, held, rows, sum(losses[-10:]) / 10


def independent(model, sequences):
    """KL(base || tuned) in nats a token, in float64, a sequence at a time, from whole logits."""
    model.double().eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids in sequences:
            ours = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            with model.disable_adapter():
                theirs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            total += (theirs.exp() * (theirs - ours)).sum().item()
            tokens += len(ids) - 1
    return total / tokens


@pytest.fixture(scope="module")
def loose(world):
    """With a budget far beyond what training spends; and the same training without any method."""
    with_budget = trained(world, [FullKL(strength="auto", budget=100.0)])
    plain = trained(world, [])
    return with_budget, plain


@pytest.mark.slow
def test_a_loose_budget_is_plain_lora(loose):
    (_, _, rows, loss), (_, _, _, plain) = loose
    assert max(row["holdfast/full_kl/strength"] for row in rows) < 1e-2
    assert loss == pytest.approx(plain, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [TargetMaskedKL, SelfReplay, UpdateDecay])
def test_the_budget_is_met(world, loose, cls):
    model, held, rows, _ = trained(world, [cls(strength="auto", budget=BUDGET)], 12 if cls is SelfReplay else 16)
    _, (plain, *_) = loose
    assert independent(plain, held) > 4 * BUDGET  # without the method the budget is far exceeded
    assert 0 < independent(model, held) < 1.15 * BUDGET
    assert max(row[f"holdfast/{cls.name}/drift"] for row in rows) > BUDGET  # there was something to bring down
    assert rows[-1][f"holdfast/{cls.name}/strength"] > 0


# --- hosts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["sft", "dpo", "trainer"])
@pytest.mark.parametrize("made", [FullKL(**TIGHT), SelfReplay(**TIGHT), UpdateDecay(**TIGHT)], ids=lambda m: m.name)
def test_trainers_log_strength_and_drift(host, made):
    trainer = runs.train(host, [made], retain=tiny.texts(40), steps=5)
    rows = logged(trainer, made.name)
    assert len(rows) == 5
    assert rows[0][:2] == [0.0, 0.0]
    assert rows[2][0] > 0
    assert rows[2][1] == rows[3][1] != rows[4][1] > 0
    assert [row[2] for row in rows] == [float(row[1] > 1e-3) for row in rows]


def test_split_and_checkpointing_change_nothing():
    def run(n, **options):
        sizes = {"gradient_accumulation_steps": n, "per_device_train_batch_size": 4 // n}
        return runs.train(
            "sft", [SelfReplay(**TIGHT), UpdateDecay(**TIGHT)], retain=tiny.texts(40), **sizes, **SGD, **options
        )

    whole = run(1)
    for other in (run(2), run(4, gradient_checkpointing=True)):
        for name in ("self_replay", "update_decay"):
            for ours, theirs in zip(logged(other, name), logged(whole, name), strict=True):
                assert ours == pytest.approx(theirs, rel=1e-3)
        assert runs.difference(tiny.trained(other.model), tiny.trained(whole.model)) <= BAR
    assert logged(whole, "self_replay")[-1][0] > 0


@pytest.mark.parametrize("kind", ["lora", "pissa"])
def test_a_run_that_is_stopped_and_resumed_goes_on_to_the_last_bit(tmp_path, kind):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    def run(folder, callbacks=(), resume=None):
        init = {"init_lora_weights": "pissa"} if kind == "pissa" else {}
        model = tiny.lora(tiny.llama(attention_dropout=0.1), lora_dropout=0.1, **init)
        trainer = runs.trainer("sft", model, steps=8, output_dir=str(folder), save_strategy="steps", save_steps=2)
        named = L2SP(strength="auto", budget={"norm": 1e-3}, budget_every=2)
        made = [TargetMaskedKL(**{**TIGHT, "budget_every": 3}), SelfReplay(**TIGHT), named]
        holdfast.attach(trainer, made, retain=tiny.texts(40), measures={"norm": norm})
        for each in callbacks:
            trainer.add_callback(each)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", [Stop()])
    resumed = run(tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-4"))
    assert runs.identical(resumed.model, whole.model)
    for name in ("target_masked_kl", "self_replay", "l2_sp"):
        assert logged(resumed, name) == logged(whole, name)
        assert logged(whole, name)[-1][0] > 0


def norm(model):
    """A measure of a user's: how far the factors B are from 0."""
    return sum(p.square().sum().item() for name, p in model.named_parameters() if "lora_B" in name)


def test_with_nothing_given_the_base_writes_what_is_measured():
    trainer = runs.trainer("sft")
    session = holdfast.attach(trainer, [UpdateDecay(strength="auto", budget=0.02)])
    held = len(session.budgets.held_out.sequences)
    assert held >= 32
    assert len(session.retain.sequences()) > 4 * held
    told = session.explain()
    assert f"KL(base || student) on {held} retain sequences, held out" in told
    assert "update_decay (at most 0.02, every 5 steps)" in told


# --- recipes ----------------------------------------------------------------------------------------------------------

RECIPE = """
model: {name: lab-aligned, lora: {r: 4}}
stages:
  - {trainer: sft, data: rows.jsonl, max_steps: 2}
methods:
  - METHOD
output: out
"""


def recipe_of(tmp_path, monkeypatch, method):
    from holdfast.recipe.config import load

    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    Path("recipe.yaml").write_text(RECIPE.strip().replace("METHOD", method))
    return load("recipe.yaml")


@pytest.mark.parametrize(("text", "budget"), [("0.02", 0.02), ("{refusal: 0.01}", {"refusal": 0.01})])
def test_a_recipe_names_a_budget(tmp_path, monkeypatch, text, budget):
    (stage,) = recipe_of(tmp_path, monkeypatch, f"target_masked_kl: {{strength: auto, budget: {text}}}").stages
    assert stage.methods == (TargetMaskedKL(strength="auto", budget=budget),)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("target_masked_kl: {strength: auto}", "line 5: target_masked_kl: strength is 'auto', which needs a budget"),
        ("update_decay: {budget: 0.02}", "line 5: update_decay: budget=0.02 is kept to by strength='auto' alone"),
        ("full_kl: {strength: auto, budget: {refusal_magin: 0.01}}", "line 5: full_kl: budget is on 'refusal_magin'"),
        ("full_kl: {strength: auto, budget: {refusal: 0.01, rare: 0.1}}", "the name of one measure"),
        ("agem: {strength: auto, budget: 0.1}", "brings back nothing that has drifted"),
        ("ewc: {strength: auto, budget: 0.1}", "ewc needs retain data: add"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_with_its_line(tmp_path, monkeypatch, method, told):
    with pytest.raises(ConfigError) as caught:
        recipe_of(tmp_path, monkeypatch, method)
    assert told in str(caught.value)


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Run everything in one process and in two."""
    folder = tmp_path_factory.mktemp("budget")
    for count in (1, 2):
        script = Path(__file__).parent / "budget_run.py"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        done = subprocess.run(
            [*command, str(script), str(folder)],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HOLDFAST_CACHE": str(tmp_path_factory.mktemp("cache"))},
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{count}.json").read_text()) for count in (1, 2)]


def test_processes_that_measure_on_other_sequences_are_refused(processes):
    assert [each["other rows refused"] for each in processes] == [False, True]


@pytest.mark.parametrize(("case", "tolerance"), [("loop", 1e-6), ("few", 1e-6), ("named", 1e-6), ("trainer", 1e-3)])
def test_two_processes_find_the_strength_of_one(processes, case, tolerance):
    one, two = (each[case] for each in processes)
    assert len(one) == len(two) == 6
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=1e-12)
    name = {"few": "full_kl", "named": "l2_sp"}.get(case, "self_replay")
    assert one[-1][f"holdfast/{name}/strength"] > 0
