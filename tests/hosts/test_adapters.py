"""Every kind of adapter of the Target-Masked KL study: the same promises from each, from a recipe and through TRL.

The base, the divergence at the start, the gradient, a strength of 0, a resume, the saved result, and scales.
"""

import copy
import math
import re

import holdfast
import pytest
import torch
from holdfast import lab
from holdfast.core.errors import ConfigError, NeverSupported, NotYetSupported, WrongSetup
from holdfast.core.reference import AdapterOff, FrozenCopy, logits_of, probe_batch
from holdfast.core.tap import Tap
from holdfast.integrations import adalora
from holdfast.integrations.peft import choose_reference
from holdfast.methods import FullKL, SelfReplay, TargetMaskedKL, safe_lora, scale_adapter
from holdfast.recipe.config import load
from holdfast.recipe.measure import at_scale
from holdfast.recipe.run import run
from holdfast.recipe.training import make_trainer
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

import runs
import tiny

ALL = "target_modules: all-linear"
KINDS = {
    "lora": "lora: {r: 4}",
    "dora": "lora: {r: 4, use_dora: true}",
    "pissa": "lora: {r: 4, init_lora_weights: pissa}",
    "adalora": f"peft: {{type: adalora, init_r: 6, target_r: 3, {ALL}}}",
    "randlora": f"peft: {{type: randlora, r: 8, {ALL}}}",
    "vera": f"peft: {{type: vera, r: 16, {ALL}}}",
    "sine_lora": f"peft: {{type: sine_lora, r: 4, omega: 50, {ALL}}}",
}
FAST = {"adalora": 0.1, "vera": 0.1}  # rates at which four steps can be seen; 0.005 for the others
RECIPE = """\
model: {{name: lab-aligned, {kind}}}
stages:
  - {{trainer: sft, data: {{data: "lab:shift", samples: 32}}, max_steps: 4, per_device_train_batch_size: 4,
     learning_rate: {rate}, save_steps: 2, logging_steps: 1, report_to: none, disable_tqdm: true}}
output: {folder}/out
"""
every_kind = pytest.mark.parametrize("kind", KINDS)


def asked(folder, kind, more="", rate=5e-3):
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(kind=KINDS[kind], folder=folder, rate=rate) + more)
    return load(file)


def adapted(kind, folder, seed=1):
    """A tiny model with an adapter of the kind, its settings those of the recipe."""
    torch.manual_seed(seed)
    return get_peft_model(tiny.llama(), asked(folder, kind).model.peft_config())


def trainer_of(kind, folder, **options):
    made = runs.trainer("sft", adapted(kind, folder), **options)
    if kind == "adalora":  # as a recipe does it
        adalora.attach(made)
    return made


def lab_logits(batch):
    model, _ = lab.load("lab-aligned")
    with torch.no_grad():
        return model(**batch).logits


@every_kind
def test_the_methods_of_the_study_on_the_labs_model(kind, tmp_path):
    """From a recipe: divergences are 0 at the start, every factor moves, and the reference is the base to the end."""
    recipe = asked(tmp_path, kind, rate=FAST.get(kind, 5e-3))
    model, tokenizer = recipe.model.load()
    stage = recipe.stages[0]
    trainer = make_trainer(stage, stage.data.rows(), model, tokenizer, recipe.model.peft_config(), tmp_path, 0)
    session = holdfast.attach(trainer, [TargetMaskedKL(), SelfReplay()], retain=lab.retain(16))
    before = tiny.trained(trainer.model)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("target_masked_kl", "self_replay"):
        values = [entry[f"holdfast/{name}/divergence"] for entry in log]
        assert abs(values[0]) <= (1e-5 if kind == "pissa" else 0.0)  # PiSSA puts W back together only nearly
        assert values[-1] > 1e-6
        assert all(map(math.isfinite, values))
    assert type(session.reference) is (FrozenCopy if kind == "pissa" else AdapterOff)
    still = [name for name, p in tiny.trained(trainer.model).items() if torch.equal(p, before[name])]
    assert [name for name in still if "lora_E" not in name] == []  # of AdaLoRA's, all ranks of a layer may be gone
    batch, tap = probe_batch(trainer.model), Tap(trainer.model)
    apart = (logits_of(session.reference, tap, batch) - lab_logits(batch)).abs().max().item()
    assert apart <= (1e-3 if kind == "pissa" else 0.0)
    assert (logits_of(None, tap, batch) - lab_logits(batch)).abs().max() > 1e-2


@every_kind
def test_the_divergences_gradient_reaches_every_factor(kind, tmp_path):
    """Away from the start, the loss of the method alone: its gradient is what finite differences of it say."""
    model = adapted(kind, tmp_path).double().eval()
    reference = choose_reference(model, None, tap := Tap(model))
    tap.remove()
    assert type(reference) is (FrozenCopy if kind == "pissa" else AdapterOff)
    params = trained(model)
    batch = tiny.batches(1, size=4)[0]
    with holdfast.preserve(model, torch.optim.SGD(params.values(), lr=0.1), [FullKL()]) as session:
        tiny.shake(model, 0.1)
        counts = session.count([batch])

        def loss():
            model(**batch)
            return session.loss(batch, counts)

        value = loss()
        value.backward()
        for name, p in params.items():
            assert p.grad is not None, name
            assert p.grad.norm() > 0, name
        direction = {name: p.grad / p.grad.norm() for name, p in params.items()}
        slope = sum((p.grad * direction[name]).sum() for name, p in params.items()).item()
        step, ends = 1e-5, []
        for sign in (1, -2):
            with torch.no_grad():
                for name, p in params.items():
                    p.add_(sign * step * direction[name])
            ends.append(loss().item())
    if kind != "dora":  # DoRA's own gradient leaves out that of its norm
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-3)  # the divergence is summed in float32


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@every_kind
def test_strength_0_is_the_run_without_the_method(kind, tmp_path):
    def after(methods):
        made = trainer_of(kind, tmp_path)
        if methods is not None:
            holdfast.attach(made, methods, retain=tiny.texts())
        made.train()
        return made.model

    alone = after(None)
    assert runs.identical(after([TargetMaskedKL(strength=0), SelfReplay(strength=0)]), alone)
    assert not runs.identical(after([TargetMaskedKL(strength=10)]), alone)  # the control


@every_kind
def test_resume_is_bit_identical(kind, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    def train(folder, stop=False, resume=None):
        made = trainer_of(kind, tmp_path, steps=6, output_dir=str(folder), save_strategy="steps", save_steps=2)
        holdfast.attach(made, [TargetMaskedKL(), SelfReplay()], retain=tiny.texts(24))
        if stop:
            made.add_callback(Stop())
        made.train(resume_from_checkpoint=resume)
        return made

    whole = train(tmp_path / "whole")
    train(tmp_path / "cut", stop=True)
    resumed = train(tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-4"))
    assert resumed.state.global_step == 6
    assert runs.identical(resumed.model, whole.model)


@every_kind
def test_a_recipe_saves_what_it_trained_and_measures_it_at_scales(kind, tmp_path, monkeypatch):
    pissa = kind == "pissa"
    scales = "evaluate: {%stask: {data: 'lab:shift', split: test, samples: 8}}\n" % (
        "" if pissa else "scales: [0, 0.5, 1], "
    )
    models = []
    recipe = asked(tmp_path, kind, "methods: [target_masked_kl]\n" + scales, rate=3e-2)

    def seen(*args):
        models.append(make_trainer(*args))
        return models[0]

    monkeypatch.setattr("holdfast.recipe.run.make_trainer", seen)
    result = run(recipe, lambda text: None)
    model, _ = lab.load("lab-aligned")
    again = PeftModel.from_pretrained(model, result.folder).eval()
    batch = probe_batch(again)
    with torch.no_grad():
        gap = (again(**batch).logits - models[0].model.eval()(**batch).logits).abs().max()
    assert gap <= (1e-3 if pissa else 1e-4)
    base, *scaled = [entry.scores["task_loss"].value for entry in result.entries]
    if not pissa:
        assert scaled[0] == base
        assert len({round(value, 6) for value in scaled}) == 3


def effective(model):
    """The weights that a model's layers apply, without bias: what they make of the unit vectors, in float64."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "base_layer"):
            unit = torch.eye(layer.base_layer.weight.shape[1], dtype=torch.float64)
            with torch.no_grad():
                found[name] = layer(unit).T
    return found


@every_kind
@pytest.mark.parametrize("factor", [0.0, 0.35, 1.0])
def test_a_scale_lies_on_the_line_from_the_base_to_the_tuned_weights(kind, factor, tmp_path):
    """Against a plain model whose weights are W + factor · (W' - W): for every kind the same thing is meant."""
    model = adapted(kind, tmp_path).double().eval()
    tiny.shake(model, 0.1)
    batch = probe_batch(model)
    if kind == "pissa":
        with pytest.raises(WrongSetup, match="'pissa' moved a part of the base"), scale_adapter(model, 0.35):
            pass
        with scale_adapter(model, 1.0):
            pass
        return
    tuned, twin = effective(model), tiny.llama().double()
    with torch.no_grad():
        for name, weight in tuned.items():
            plain = twin.get_submodule(name.removeprefix("base_model.model.")).weight
            plain += factor * (weight - plain)
        expected = twin(**batch).logits
        whole = model(**batch).logits
        for context in (scale_adapter, at_scale):
            with context(model, factor):
                assert (model(**batch).logits - expected).abs().max() <= 1e-11
        if factor == 0:
            base = tiny.llama().double()(**batch).logits
            with scale_adapter(model, 0.0):
                assert torch.equal(model(**batch).logits, base)
        assert torch.equal(model(**batch).logits, whole)  # and nothing stays behind
    assert not any(module._forward_hooks for module in model.modules())


def test_of_plain_lora_a_scale_is_pefts_bit_for_bit():
    from peft.helpers import rescale_adapter_scale

    model = tiny.lora(tiny.llama()).eval()
    tiny.shake(model)
    batch = probe_batch(model)
    with torch.no_grad():
        for factor in (0.7, 0.85, 1.0):
            with rescale_adapter_scale(model, factor):
                theirs, merged = model(**batch).logits, copy.deepcopy(model).merge_and_unload()(**batch).logits
            with scale_adapter(model, factor):
                assert torch.equal(model(**batch).logits, theirs)
                assert torch.equal(copy.deepcopy(model).merge_and_unload()(**batch).logits, merged)


@pytest.mark.parametrize("kind", ["dora", "vera", "sine_lora"])
def test_what_is_scaled_in_the_forward_cannot_be_merged_there(kind, tmp_path):
    """It would go into the weights whole, without a word."""
    model = adapted(kind, tmp_path).double().eval()
    tiny.shake(model)
    batch = probe_batch(model)
    with torch.no_grad():
        whole = model(**batch).logits
        with scale_adapter(model, 0.5), pytest.raises(WrongSetup, match="would put the whole of it into the weights"):
            copy.deepcopy(model).merge_and_unload()
        with scale_adapter(model, 1.0):
            copy.deepcopy(model).merge_and_unload()
        assert torch.equal(model(**batch).logits, whole)
        assert (model.merge_and_unload()(**batch).logits - whole).abs().max() <= 1e-10


@pytest.mark.parametrize("kind", ["pissa", "dora", "adalora", "sine_lora"])
def test_safe_lora_refuses_what_it_would_not_project(kind, tmp_path):
    model = adapted(kind, tmp_path)
    before = tiny.trained(model)
    with pytest.raises(NeverSupported, match=f"safe_lora on {kind}"):
        safe_lora(model, {}, {})
    assert all(torch.equal(p, before[name]) for name, p in tiny.trained(model).items())


def test_safe_lora_refuses_a_merged_adapter_and_a_model_without_one():
    merged = tiny.lora(tiny.llama())
    merged.merge_adapter()
    with pytest.raises(WrongSetup, match="merged into the base"):
        safe_lora(merged, {}, {})
    with pytest.raises(WrongSetup, match="no LoRA adapter is trained"):
        safe_lora(tiny.llama(), {}, {})


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"init_lora_weights": "olora"}, "'olora' moved a part"),
        ({"bias": "lora_only"}, "biases of the base are trained in place"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save trains whole weights"),
    ],
)
def test_a_scale_that_would_not_end_at_the_base_is_refused(options, why):
    model = tiny.lora(tiny.llama(attention_bias=True), **options)
    tiny.shake(model)
    with pytest.raises(WrongSetup, match=why), scale_adapter(model, 0.5):
        pass
    merged = tiny.lora(tiny.llama())
    merged.merge_adapter()
    with pytest.raises(WrongSetup, match="merged into the base"), scale_adapter(merged, 0.0):
        pass


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        (
            "lora: {init_lora_weights: pissa}",
            "evaluate: {scales: [0.5], t: {data: 'lab:shift'}}",
            "'pissa' moved a part",
        ),
        ("lora: {bias: all}", "evaluate: {scales: [0.5], t: {data: 'lab:shift'}}", "biases of the base are trained"),
        ("", "evaluate: {scales: [0.5], t: {data: 'lab:shift'}}", "this model has none: leave scales out"),
        ("peft: {type: adalora, init_r: 4, target_r: 8}", "", "init_r must be above target_r"),
        ("peft: {type: sine_lora, use_dora: true}", "", "use_dora forms dW in another way"),
        ("peft: {type: sine_lra}", "", "Did you mean 'SINE_LORA'?"),
    ],
)
def test_a_recipe_is_told_before_it_runs(kind, more, why, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(kind=kind, folder=tmp_path, rate=1e-3).replace(", }", "}") + more)
    with pytest.raises(ConfigError, match=re.escape(why)):
        load(file)


def test_adalora_is_for_one_stage(tmp_path):
    file = tmp_path / "recipe.yaml"
    text = RECIPE.format(kind=KINDS["adalora"], folder=tmp_path, rate=1e-3)
    stage = text[text.index("  - {trainer") : text.index("output:")]
    file.write_text(text.replace(stage, stage + stage))
    with pytest.raises(ConfigError, match="line 1: AdaLoRA gives its ranks away in one stage"):
        load(file)


def alive(model):
    return sum(int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name)


def test_adalora_gives_its_ranks_away_while_it_trains(tmp_path):
    """14 layers of rank 6 at first, of rank 3 in the mean at the end: by the schedule, and cut where it is saved."""
    made = trainer_of("adalora", tmp_path, steps=8, save_strategy="steps", save_steps=4, output_dir=str(tmp_path))
    bare = runs.trainer("sft", adapted("adalora", tmp_path), steps=8)
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(alive(made.model))

    made.add_callback(Look())
    made.train()
    budgets = [int((6 - 3) * 14 * (1 - step / 8) ** 3 + 3 * 14) for step in range(1, 9)]
    assert seen == budgets
    assert seen[-1] == 3 * 14
    config = made.model.peft_config["default"]
    assert config.total_step == 8
    made.model.save_pretrained(tmp_path / "done")
    stored = load_file(tmp_path / "done" / "adapter_model.safetensors")
    assert sum(len(t) for name, t in stored.items() if "lora_E" in name) == 3 * 14
    half = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert sum(len(t) for name, t in half.items() if "lora_E" in name) == 6 * 14
    bare.train()  # what a trainer does with AdaLoRA by itself: nothing
    assert alive(bare.model) == 6 * 14


def test_adalora_in_dpo(tmp_path):
    asked(tmp_path, "adalora")
    file = tmp_path / "recipe.yaml"
    file.write_text(file.read_text().replace("sft", "dpo").replace("lab:shift", "lab:preference_pairs"))
    result = run(load(file), lambda text: None)
    stored = load_file(result.folder / "adapter_model.safetensors")
    assert sum(len(t) for name, t in stored.items() if "lora_E" in name) == 3 * 35


@pytest.mark.parametrize("accumulation", [1, 2])
def test_adaloras_regulariser_is_in_the_loss_once_a_step(accumulation, tmp_path):
    """Plain SGD on two micro-batches or one: the step is the task's and w times the regulariser's, by hand."""

    def moved(weight, attached=True):
        model = adapted("adalora", tmp_path)
        model.peft_config["default"].orth_reg_weight = weight
        sizes = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
        made = runs.trainer("sft", model, steps=2, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, **sizes)
        if attached:
            adalora.attach(made)
        start, first = tiny.trained(model), []

        class Look(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                first.append(tiny.trained(model))

        made.add_callback(Look())
        made.train()
        return {name: p - start[name] for name, p in first[0].items() if "lora_E" not in name}

    model = adapted("adalora", tmp_path)
    factors = {name: p for name, p in trained(model).items() if "lora_E" not in name}
    penalty = sum(
        ((p @ p.T if "lora_A" in name else p.T @ p) - torch.eye(6)).square().sum().sqrt() for name, p in factors.items()
    ) / len(factors)
    assert adalora.orthogonality(model).item() == pytest.approx(penalty.item(), rel=1e-6)
    gradients = dict(zip(factors, torch.autograd.grad(penalty, list(factors.values())), strict=True))
    with_it, without, alone = moved(0.5), moved(0.0), moved(0.5, attached=False)
    assert all(torch.equal(alone[name], without[name]) for name in factors)  # in TRL's own loss it is not
    for name, gradient in gradients.items():
        torch.testing.assert_close(with_it[name] - without[name], -0.1 * 0.5 * gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"total_step": 100}, "total_step is 100, but this run has 8 steps"),
        ({"tinit": 5, "tfinal": 3}, "would never give a rank away: of 8 steps, tinit takes 5 and tfinal 3"),
    ],
)
def test_an_adalora_schedule_that_does_not_fit_the_run_is_refused(settings, why, tmp_path):
    made = trainer_of("adalora", tmp_path, steps=8)
    vars(made.model.peft_config["default"]).update(settings)
    with pytest.raises(WrongSetup, match=why):
        made.train()


def test_adalora_is_attached_once_before_the_methods_and_to_trl(tmp_path):
    made = trainer_of("adalora", tmp_path)
    with pytest.raises(WrongSetup, match="does what AdaLoRA needs already"):
        adalora.attach(made)
    with pytest.raises(WrongSetup, match="has no AdaLoRA adapter"):
        adalora.attach(runs.trainer("sft", tiny.lora(tiny.llama())))
    late = runs.trainer("sft", adapted("adalora", tmp_path))
    holdfast.attach(late, [TargetMaskedKL()])
    with pytest.raises(WrongSetup, match="comes before holdfast.attach"):
        adalora.attach(late)
    with pytest.raises(NotYetSupported, match="it would count twice"):
        adalora.attach(runs.trainer("trainer", adapted("adalora", tmp_path)))


def test_an_adalora_checkpoint_without_its_importances_is_refused(tmp_path):
    trainer_of("adalora", tmp_path, steps=4, save_strategy="steps", save_steps=2, output_dir=str(tmp_path)).train()
    (tmp_path / "checkpoint-2" / adalora.STATE).unlink()
    with pytest.raises(WrongSetup, match="as if no rank had been important"):
        trainer_of("adalora", tmp_path, steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
