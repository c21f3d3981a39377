"""A run that is stopped and resumed ends where an uninterrupted one does, bit for bit."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import holdfast
import pytest
import torch
from holdfast.core.errors import WrongSetup
from holdfast.core.method import WeightMethod
from holdfast.methods import AGEM, L2SP, TargetMaskedKL

import runs
import tiny


@dataclass(frozen=True, kw_only=True)
class Dice(WeightMethod):
    """Draws a random direction every second step: its generator must survive a resume too."""

    name: ClassVar[str] = "dice"
    refresh_every: int | None = 2

    def init(self, setup):
        return {k: torch.randn(p.shape, generator=setup.generator) for k, p in setup.params.items()}

    def penalty(self, direction, weights):
        return 0.1 * sum((p * direction[k]).sum() for k, p in weights.params.items())


METHODS = [TargetMaskedKL(), L2SP(strength=0.1), AGEM(refresh_every=3), Dice()]


def run(folder, model, steps=6, stop=None, resume=None, **options):
    """A run of six steps; `stop` ends it there, as a kill just after a checkpoint would."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == stop

    trainer = runs.trainer(
        "sft", model, steps=steps, output_dir=str(folder), save_strategy="steps", save_steps=2, **options
    )
    holdfast.attach(trainer, METHODS, retain=tiny.texts(24))
    if stop:
        trainer.add_callback(Stop())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("kind", ["lora", "pissa", "dense"])
def test_resume_is_bit_identical(tmp_path, kind):
    def model():
        base = tiny.llama(attention_dropout=0.1)
        if kind == "dense":
            return base
        return tiny.lora(base, lora_dropout=0.1, **({"init_lora_weights": "pissa"} if kind == "pissa" else {}))

    whole = run(tmp_path / "whole", model())
    run(tmp_path / "cut", model(), stop=4)
    resumed = run(tmp_path / "cut", model(), resume=str(tmp_path / "cut" / "checkpoint-4"))
    assert resumed.state.global_step == 6
    assert runs.identical(resumed.model, whole.model)
    ours, theirs = resumed.state.log_history[-2], whole.state.log_history[-2]
    assert ours["holdfast/target_masked_kl/divergence"] == theirs["holdfast/target_masked_kl/divergence"] > 0


def test_checkpoint_is_safetensors_and_json_and_nothing_half_written(tmp_path):
    run(tmp_path, tiny.lora(tiny.llama()))
    folder = tmp_path / "checkpoint-2"
    ours = sorted(path.name for path in folder.iterdir() if "holdfast" in path.name)
    assert ours == ["holdfast.json", "holdfast.safetensors"]
    record = json.loads((folder / "holdfast.json").read_text())
    assert record["step"] == 2
    assert record["schema"] == 2


@pytest.mark.parametrize("damage", ["missing", "torn", "mixed", "other methods"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    run(tmp_path, tiny.lora(tiny.llama()))
    folder, other = tmp_path / "checkpoint-4", tmp_path / "checkpoint-2"
    methods, expected = METHODS, "two different moments"
    if damage == "missing":
        (folder / "holdfast.json").unlink()
        expected = "no state of holdfast"
    elif damage == "torn":
        file = folder / "holdfast.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "mixed":
        shutil.copy(other / "holdfast.safetensors", folder)
    else:
        methods, expected = [L2SP(strength=0.2)], "other methods or settings"
    trainer = runs.trainer("sft", tiny.lora(tiny.llama()), steps=6, output_dir=str(tmp_path))
    holdfast.attach(trainer, methods, retain=tiny.texts())
    with pytest.raises(WrongSetup, match=expected):
        trainer.train(resume_from_checkpoint=str(folder))


def test_plain_loop_saves_and_resumes(tmp_path):
    def steps(model, optimizer, session, batches):
        for batch in batches:
            (model(**batch).loss + session.loss(batch)).backward()
            session.gradients_ready()
            optimizer.step()
            optimizer.zero_grad()

    def fresh():
        model = tiny.lora(tiny.llama(), init_lora_weights="pissa")
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    rows, retain = tiny.batches(6), tiny.batches(5)
    whole, optimizer = fresh()
    with holdfast.preserve(whole, optimizer, METHODS, retain=retain) as session:
        steps(whole, optimizer, session, rows)
    first, optimizer = fresh()
    with holdfast.preserve(first, optimizer, METHODS, retain=retain) as session:
        steps(first, optimizer, session, rows[:3])
        session.save(tmp_path)
        weights, moments = tiny.trained(first), optimizer.state_dict()
    second, optimizer = fresh()
    with holdfast.preserve(second, optimizer, METHODS, retain=retain) as session:
        session.load(tmp_path)
        second.load_state_dict(weights, strict=False)
        optimizer.load_state_dict(moments)
        steps(second, optimizer, session, rows[3:])
    assert runs.identical(second, whole)
    assert {path.name for path in Path(tmp_path).iterdir()} == {"holdfast.json", "holdfast.safetensors"}
