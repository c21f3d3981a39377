"""An added loss is a mean over the tokens of the optimizer step, however the step is split, padded or packed."""

import os
import subprocess
import sys
from pathlib import Path

import holdfast
import pytest
import torch
from holdfast.methods import AGEM, L2SP, FullKL, TargetMaskedKL
from safetensors.torch import load_file

import runs
import tiny

METHODS = [
    TargetMaskedKL(strength=2.0),
    FullKL(strength=0.5, positions="prompt"),
    L2SP(strength=0.1),
    AGEM(refresh_every=2),
]
BAR = 1e-5
# SGD: AdamW divides by |g|, so rounding on a parameter with hardly any gradient would be blown up to a full step
SGD = {"optim": "sgd", "learning_rate": 0.5, "steps": 5}


def model(kind):
    return tiny.lora(tiny.llama()) if kind == "lora" else tiny.llama()


def moved(trained, kind="lora"):
    """How the run changed the model: what must agree, not the weights that it started from."""
    start = tiny.trained(model(kind))
    return {k: v - start[k] for k, v in tiny.trained(trained).items()}


def split(host, n, methods, kind="lora", **options):
    """A run whose optimizer steps hold four rows, in n micro-batches; how it changed the model."""
    sizes = {"gradient_accumulation_steps": n, "per_device_train_batch_size": 4 // n}
    return moved(runs.train(host, methods, model(kind), **sizes, **SGD, **options).model, kind)


@pytest.mark.parametrize("host", ["sft", "dpo", "trainer"])
@pytest.mark.parametrize("positions", ["completion", "prompt", "all"])
def test_accumulation_split(host, positions):
    methods = [TargetMaskedKL(strength=2.0, positions=positions), *METHODS[1:]]
    whole = split(host, 1, methods)
    assert runs.difference(split(host, 2, methods), whole) <= BAR
    assert runs.difference(split(host, 4, methods), whole) <= BAR
    assert runs.difference(split(host, 1, None), whole) > 1e-2  # the methods did act


@pytest.mark.parametrize("host", ["sft", "dpo", "trainer"])
@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_accumulation_split_with_checkpointing(host, kind):
    whole = split(host, 1, METHODS, kind)
    assert runs.difference(split(host, 4, METHODS, kind, gradient_checkpointing=True), whole) <= BAR


@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_accumulation_split_in_a_plain_loop(kind):
    def run(n):
        student = model(kind)
        optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.5)
        runs.loop(METHODS, student, split=n, steps=5, optimizer=optimizer)
        return moved(student, kind)

    whole = run(1)
    assert runs.difference(run(2), whole) <= BAR
    assert runs.difference(run(4), whole) <= BAR


def test_accumulation_without_counts_is_refused():
    model = tiny.lora(tiny.llama())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    first, second = tiny.batches(2)
    with holdfast.preserve(model, optimizer, [TargetMaskedKL()]) as session:
        model(**first)
        session.loss(first)
        model(**second)
        with pytest.raises(holdfast.core.errors.WrongSetup, match="session.count"):
            session.loss(second)


def added_loss(model, batches, positions):
    """Value and gradient of one step's added loss over micro-batches."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    # the start is the reference, then the student is moved away from it
    with holdfast.preserve(model, optimizer, [TargetMaskedKL(positions=positions)], reference="start") as session:
        tiny.shake(model)
        counts, total = session.count(batches), 0.0
        for batch in batches:
            # use_cache=False: with a cache transformers does not look for packed documents
            model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
            loss = session.loss(batch, counts)
            loss.backward()
            total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("positions", ["completion", "prompt", "all"])
def test_padding(positions):
    batch = tiny.batches(1, size=4)[0]
    wider = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 5), value=0),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 5), value=0),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 5), value=-100),
    }
    value, gradient = added_loss(tiny.lora(tiny.llama()), [batch], positions)
    padded, its_gradient = added_loss(tiny.lora(tiny.llama()), [wider], positions)
    assert value > 1e-3
    assert padded == pytest.approx(value, rel=BAR)
    assert runs.difference(its_gradient, gradient) <= BAR


@pytest.mark.parametrize("positions", ["completion", "prompt", "all"])
def test_left_padding(positions):
    batch = tiny.batches(1, size=4)[0]
    real = batch["attention_mask"]
    rolled = {
        k: torch.stack([row.roll(int((1 - m).sum())) for row, m in zip(v, real, strict=True)]) for k, v in batch.items()
    }
    rolled["position_ids"] = (rolled["attention_mask"].cumsum(1) - 1).clamp(min=0)
    value, gradient = added_loss(tiny.lora(tiny.llama()), [batch], positions)
    left, its_gradient = added_loss(tiny.lora(tiny.llama()), [rolled], positions)
    assert left == pytest.approx(value, rel=BAR)
    assert runs.difference(its_gradient, gradient) <= BAR


@pytest.mark.parametrize("positions", ["completion", "prompt", "all"])
def test_packing(positions):
    """Documents laid end to end in one row, told apart by position, weigh what they weigh in rows of their own."""
    batch = tiny.batches(1, size=3)[0]
    pieces = [batch["attention_mask"][i].bool() for i in range(3)]
    labels = [batch["labels"][i][keep].clone() for i, keep in enumerate(pieces)]
    packed = {
        "input_ids": torch.cat([batch["input_ids"][i][keep] for i, keep in enumerate(pieces)])[None],
        "position_ids": torch.cat([torch.arange(int(keep.sum())) for keep in pieces])[None],
        "labels": torch.cat(labels)[None],
    }
    value, gradient = added_loss(tiny.lora(tiny.llama()), [batch], positions)
    laid, its_gradient = added_loss(tiny.lora(tiny.llama()), [packed], positions)
    assert laid == pytest.approx(value, rel=BAR)
    assert runs.difference(its_gradient, gradient) <= BAR


def test_one_against_two_processes(tmp_path):
    """torchrun, gloo, two processes: the same rows per optimizer step, half on each."""
    for processes in (1, 2):
        script = Path(__file__).parent / "distributed_run.py"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
            str(script),
            str(tmp_path),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    for host in ("sft", "sft dense", "dpo", "loop"):
        one, two = (load_file(tmp_path / f"{host}{n}.safetensors") for n in (1, 2))
        logged = "holdfast/target_masked_kl/divergence"
        assert two.pop(logged) == pytest.approx(one.pop(logged).item(), rel=BAR)
        assert runs.difference(two, one) <= BAR, host
