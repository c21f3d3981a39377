"""Real trainers with what is kept of the base: the run is that with the live base, which runs in one epoch alone."""

import os
import subprocess
import sys
from pathlib import Path

import holdfast
import pytest
import torch
from datasets import Dataset
from holdfast import lab
from holdfast.methods import FullKL, TargetMaskedKL
from holdfast.retain.task_folder import contents, manifest
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import runs
import tiny

BAR = 1e-4


def trained(trainer, methods=(TargetMaskedKL(strength=2.0),), **options):
    """Train, and return how often the base ran in each epoch."""
    session = holdfast.attach(trainer, list(methods), **options)
    counted = runs.Bases(session)
    trainer.add_callback(counted)
    trainer.train()
    return counted.ran


def losses(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def moved(trainer):
    start = tiny.trained(tiny.lora(tiny.llama()))
    return {k: v - start[k] for k, v in tiny.trained(trainer.model).items()}


def on_the_lab(folder, **options):
    """Two epochs of a new task, shuffled, accumulated, under TRL; the model learns, and a lot of it."""
    model, tokenizer = lab.load("lab-aligned")
    torch.manual_seed(0)
    args = SFTConfig(
        output_dir=str(folder), num_train_epochs=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=5e-3, logging_steps=1, bf16=False, use_cpu=True, seed=0, report_to="none", save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=False, **options,
    )  # fmt: skip
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    data = Dataset.from_list(lab.task("shift", n=72))
    return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=adapter)


def test_two_epochs_of_sft_on_the_lab(tmp_path):
    live, cached, read = (on_the_lab(tmp_path / name) for name in ("live", "cached", "read"))
    assert trained(live) == [18, 18, 0]
    assert trained(cached, cache=tmp_path / "kept") == [18, 0, 0]
    assert trained(read, cache=tmp_path / "kept", one_pass=False) == [0, 0, 0]
    assert losses(live)[-1] < 0.7 * losses(live)[0]
    assert losses(live, "holdfast/target_masked_kl/divergence")[-1] > 0.01
    for trainer in (cached, read):
        for key in ("loss", "holdfast/target_masked_kl/divergence", "entropy", "mean_token_accuracy"):
            assert losses(trainer, key) == pytest.approx(losses(live, key), abs=BAR)
        assert runs.difference(tiny.trained(trainer.model), tiny.trained(live.model)) < BAR
    tokens = losses(cached, "holdfast/cache/base_ran_for_tokens")
    (kind,) = contents(tmp_path / "kept", manifest(tmp_path / "kept"))
    assert sum(tokens) == kind.tokens
    assert kind.sequences == 72
    assert "One pass over the head" in cached.holdfast.explain()
    assert "72 sequences are there" in cached.holdfast.explain()


@pytest.mark.parametrize(
    ("host", "method", "steps"),  # an epoch is 16 steps of the trainer's rows, and 8 of DPO's
    [
        ("trainer", TargetMaskedKL(strength=2.0), 20),
        ("trainer", TargetMaskedKL(direction="reverse"), 18),
        ("dpo", FullKL(), 11),
    ],
)
def test_other_hosts(host, method, steps, tmp_path):
    live, cached = (runs.trainer(host, steps=steps) for _ in range(2))
    trained(live, [method])
    ran = trained(cached, [method], cache=tmp_path)
    assert ran[0] == (32 if host == "trainer" else 16)
    assert not any(ran[1:])
    assert losses(cached) == pytest.approx(losses(live), abs=BAR)
    assert runs.difference(moved(cached), moved(live)) < 2e-3  # of the change alone, under AdamW


def test_a_micro_batch_without_labels_in_one_pass_with_a_base_of_another_width(tmp_path):
    rows = [{name: value[i] for name, value in batch.items()} for batch in tiny.batches(2) for i in range(2)]
    rows[1] = {**rows[1], "labels": torch.full_like(rows[1]["labels"], -100)}
    made = []
    for name, cache in (("live", False), ("made", tmp_path / "kept"), ("read", tmp_path / "kept")):
        args = TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=2, per_device_train_batch_size=1, logging_steps=1, use_cpu=True,
            gradient_accumulation_steps=2, report_to="none", save_strategy="no", disable_tqdm=True,
            gradient_checkpointing=False,
        )  # fmt: skip
        model, tokenizer = tiny.lora(tiny.llama()), tiny.tokenizer()
        trainer = Trainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
        ran = trained(trainer, reference=tiny.llama(seed=4, hidden_size=48), cache=cache)
        assert "One pass over the head" in trainer.holdfast.explain()
        made.append((losses(trainer), sum(ran)))
    assert [count for _, count in made] == [4, 3, 0]  # where nothing is asked for, nothing is made
    for found, _ in made[1:]:
        assert found == pytest.approx(made[0][0], abs=BAR)


@pytest.mark.parametrize("options", [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 24}])
def test_padding_free_and_packed_batches_in_another_order(options, tmp_path):
    live, cached = (runs.trainer("sft", steps=12, dataloader_num_workers=2, **options) for _ in range(2))
    trained(live)
    ran = trained(cached, cache=tmp_path)
    assert not any(ran[1:])
    assert losses(cached) == pytest.approx(losses(live), abs=BAR)
    assert sum(losses(cached, "holdfast/cache/base_ran_for_tokens")) > 20


def test_bfloat16_autocast_is_part_of_it(tmp_path):
    live, cached, plain = (runs.trainer("sft", steps=9, bf16=bf16) for bf16 in (True, True, False))
    trained(live)
    assert not any(trained(cached, cache=tmp_path)[1:])
    assert manifest(tmp_path).facts["autocast"] == "bfloat16"
    assert losses(cached) == pytest.approx(losses(live), abs=1e-2)
    with pytest.raises(holdfast.core.errors.WrongSetup, match="autocast: bfloat16 there, off here"):
        trained(plain, cache=tmp_path)


def test_a_run_that_is_resumed_reads_what_it_kept(tmp_path):
    """A dense model: its base is a copy of the start, which a checkpoint brings back; its head is trained."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    def trainer(folder):
        # 32 rows, four a step: an epoch is eight steps
        return runs.trainer("sft", tiny.llama(), steps=10, output_dir=str(folder), save_strategy="steps", save_steps=4)

    whole, cut, again = trainer(tmp_path / "whole"), trainer(tmp_path / "cut"), trainer(tmp_path / "cut")
    trained(whole)
    holdfast.attach(cut, [TargetMaskedKL(strength=2.0)], cache=tmp_path / "kept")
    cut.add_callback(Stop())
    cut.train()
    session = holdfast.attach(again, [TargetMaskedKL(strength=2.0)], cache=tmp_path / "kept")
    again.add_callback(counted := runs.Bases(session))
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert counted.ran == [8, 0, 0]  # the second half of the first epoch
    assert runs.difference(tiny.trained(again.model), tiny.trained(whole.model)) < 1e-5
    assert "completion-hidden" in again.holdfast.explain()


def test_detach_takes_everything_away(tmp_path):
    trainer = runs.trainer("sft")
    before = [type(each).__name__ for each in trainer.callback_handler.callbacks]
    holdfast.attach(trainer, [TargetMaskedKL()], cache=tmp_path)
    assert len(trainer.callback_handler.callbacks) == len(before) + 1
    holdfast.detach(trainer)
    assert [type(each).__name__ for each in trainer.callback_handler.callbacks] == before


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The same two epochs in one process and in two, each with a cache and without."""
    folder = tmp_path_factory.mktemp("task_cache")
    script = Path(__file__).parent / "task_cache_run.py"
    for count in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOLDFAST_CACHE": str(folder / "unused")}
        done = subprocess.run(
            [*command, str(script), str(folder)], capture_output=True, text=True, timeout=1200, env=environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_two_processes_keep_and_read_together(processes):
    """Rows go to other processes in every epoch: each finds what the other kept, and nobody waits or writes twice."""
    one, two = (load_file(processes / f"cached{n}.safetensors") for n in (1, 2))
    live = load_file(processes / "live2.safetensors")
    assert two.pop("ran").tolist() == [[4, 0], [4, 0]]  # micro-batches of an epoch, by process
    assert one.pop("ran").tolist() == [[8, 0]]
    live.pop("ran")
    assert runs.difference(two, live) < 1e-4
    assert runs.difference(two, one) < 1e-4
    assert torch.cat([change.flatten() for change in live.values()]).norm() > 1e-2
    (kind,) = contents(processes / "kept2", manifest(processes / "kept2"))
    assert kind.sequences == 16
    files = [file.name for file in (processes / "kept2").glob("*/*")]
    assert len(files) == 2
    assert all(name.endswith(".safetensors") for name in files)
