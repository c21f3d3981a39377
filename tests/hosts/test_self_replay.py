"""Self-replay on real trainers and over processes: the host's own run is left alone, its split changes nothing."""

import os
import subprocess
import sys
from pathlib import Path

import holdfast
import pytest
import torch
from holdfast.core.retain import STREAM
from holdfast.methods import AGEM, SelfReplay, TargetMaskedKL
from safetensors.torch import load_file

import runs
import tiny

BAR = 1e-5  # float32 runs, as in test_invariance
SGD = {"optim": "sgd", "learning_rate": 0.5, "steps": 4}


def moved(trainer, kind="lora"):
    start = tiny.trained(tiny.lora(tiny.llama()) if kind == "lora" else tiny.llama())
    return {k: v - start[k] for k, v in tiny.trained(trainer.model).items()}


@pytest.mark.parametrize("host", ["sft", "dpo", "trainer"])
@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_accumulation_split(host, kind):
    """Four examples a step in 1, 2 or 4 micro-batches: a share of 3/7 is 3 sequences, so no split is even."""
    methods = [SelfReplay(strength=3.0, share=3 / 7)]

    def split(n, methods=methods, **options):
        sizes = {"gradient_accumulation_steps": n, "per_device_train_batch_size": 4 // n}
        model = tiny.lora(tiny.llama()) if kind == "lora" else tiny.llama()
        return runs.train(host, methods, model, retain=tiny.texts(24), **sizes, **SGD, **options)

    whole = split(1)
    assert whole.holdfast.retain.positions[STREAM] == 4 * 3
    assert runs.difference(moved(split(2), kind), moved(whole, kind)) <= BAR
    assert runs.difference(moved(split(4, gradient_checkpointing=True), kind), moved(whole, kind)) <= BAR
    assert runs.difference(moved(split(1, None), kind), moved(whole, kind)) > 1e-2  # it did act


def test_padding_free_batches_take_as_many_sequences_as_padded_ones():
    methods = [SelfReplay(strength=3.0, share=0.5)]
    padded = runs.train("sft", methods, retain=tiny.texts(24), **SGD)
    free = runs.train("sft", methods, retain=tiny.texts(24), padding_free=True, max_length=None, **SGD)
    assert free.holdfast.retain.positions[STREAM] == padded.holdfast.retain.positions[STREAM] == 4 * 4
    assert runs.difference(moved(free), moved(padded)) <= BAR


def logs(trainer, *keys):
    return [[entry[key] for key in keys] for entry in trainer.state.log_history if keys[0] in entry]


def test_the_hosts_metrics_data_order_and_random_numbers_are_its_own():
    """Learning rate 0: with dropout and from the second epoch on, what TRL measures of the task is what it was."""

    def run(methods):
        model = tiny.lora(tiny.llama(attention_dropout=0.1), lora_dropout=0.1)
        tiny.shake(model)
        trainer = runs.trainer("sft", model, learning_rate=0.0, steps=12)  # 32 rows: one epoch and a half
        if methods is not None:
            holdfast.attach(trainer, methods, retain=tiny.texts(24), reference="base")
        trainer.train()
        return trainer

    keys = ("mean_token_accuracy", "entropy", "num_tokens")
    alone, off, on = run(None), run([SelfReplay(strength=0)]), run([SelfReplay()])
    assert len(logs(alone, *keys)) == 12
    assert logs(alone, "loss", *keys) == logs(off, "loss", *keys)
    assert logs(alone, *keys) == logs(on, *keys)
    ours = logs(on, "loss", "holdfast/self_replay/loss")
    assert all(added > 1e-3 for _, added in ours)
    for (loss,), (both, added) in zip(logs(alone, "loss"), ours, strict=True):
        assert both == pytest.approx(loss + added, abs=2e-4)  # TRL rounds what it logs


def test_it_keeps_what_it_replays():
    """The point of it all: the student strays from the base less on the retain data, and still learns the task."""
    plain = runs.train("sft", [SelfReplay(strength=1e-8, share=0.5)], retain=tiny.texts(24), steps=30)
    held = runs.train("sft", [SelfReplay(strength=3.0, share=0.5)], retain=tiny.texts(24), steps=30)
    (far,), (near,) = (logs(t, "holdfast/self_replay/divergence")[-1] for t in (plain, held))
    assert near < 0.5 * far
    first, last = logs(held, "mean_token_accuracy")[0], logs(held, "mean_token_accuracy")[-1]
    assert last > first


def test_a_run_that_is_stopped_and_resumed_reads_on(tmp_path):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    def run(folder, callbacks=(), resume=None):
        model = tiny.lora(tiny.llama(attention_dropout=0.1), lora_dropout=0.1)
        trainer = runs.trainer("sft", model, steps=6, output_dir=str(folder), save_strategy="steps", save_steps=2)
        # one retain sequence for each two of the task, from a pool that ends in the middle; AGEM reads on its own
        methods = [SelfReplay(share=1 / 3), TargetMaskedKL(), AGEM(refresh_every=3)]
        holdfast.attach(trainer, methods, retain=tiny.texts(7))
        for each in callbacks:
            trainer.add_callback(each)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", [Stop()])
    resumed = run(tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-4"))
    assert whole.holdfast.retain.positions[STREAM] == resumed.holdfast.retain.positions[STREAM] == 12
    assert runs.identical(resumed.model, whole.model)


def test_a_plain_loop():
    model, session = runs.loop([SelfReplay(share=0.5)], split=2, retain=tiny.batches(8))
    assert session.retain.positions[STREAM] == 3 * 4
    assert not runs.identical(model, runs.loop(None)[0])
    assert session.pop_metrics()["holdfast/self_replay/divergence"] > 0


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Run everything in one process and in two."""
    folder = tmp_path_factory.mktemp("stream")
    for count in (1, 2):
        cache = tmp_path_factory.mktemp("cache")  # each samples for itself
        script = Path(__file__).parent / "stream_run.py"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        done = subprocess.run(
            [*command, str(script), str(folder)],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HOLDFAST_CACHE": str(cache)},
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("case", ["lora", "dense", "accumulated", "checkpointed", "few"])
def test_two_processes_have_the_gradients_of_one(processes, case):
    """In float64; also where the second process has no retain sequence."""
    one, two = (load_file(processes / f"{case}{n}.safetensors") for n in (1, 2))
    logged = [key for key in one if key.startswith("logged/")]
    assert {key.split("/")[-2] for key in logged} == {"self_replay", "full_kl", "target_masked_kl"}
    for key in logged:
        assert two.pop(key).item() == pytest.approx(one.pop(key).item(), rel=1e-6)
    for step in ("0/", "1/"):
        ours, theirs = ({k: v for k, v in each.items() if k.startswith(step)} for each in (two, one))
        assert torch.cat([g.flatten() for g in theirs.values()]).norm() > 1e-2
        assert runs.difference(ours, theirs) <= 1e-10


@pytest.mark.parametrize("host", ["sft", "dpo"])
def test_two_processes_train_as_one(processes, host):
    one, two = (load_file(processes / f"{host}{n}.safetensors") for n in (1, 2))
    assert two.pop("logged").item() == pytest.approx(one.pop("logged").item(), rel=BAR)
    assert runs.difference(two, one) <= BAR


def test_two_processes_sample_one_pool(processes):
    one, two = (load_file(processes / f"sampled{n}.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
