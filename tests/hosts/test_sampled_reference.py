"""The output loss on a share of the sequences: right in expectation, exactly, and the base runs on those alone."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import holdfast
import pytest
import torch
from holdfast.core import sampling
from holdfast.core.errors import ConfigError, WrongSetup
from holdfast.core.sampling import Sampling, chosen, cut, not_of_rows
from holdfast.core.session import Session
from holdfast.core.tap import Tap
from holdfast.integrations.peft import choose_reference
from holdfast.methods import FullKL, TargetMaskedKL

import runs
import tiny


def student(layers=2, dtype=torch.float64, **changes):
    model = tiny.lora(tiny.llama(num_hidden_layers=layers), **changes).to(dtype)
    tiny.shake(model)
    return model


def session_of(model, *methods, seed=0):
    """A session whose base is the model with its adapter off, although the adapter is no fresh one."""
    return Session(model, methods, reference=choose_reference(model, "base", tap := Tap(model)), tap=tap, seed=seed)


def step(session, model, batches, start=None):
    """Loss and gradient of a step of these micro-batches; `start`: the number drawn for the step."""
    if start is not None:
        session.sampling.start = lambda step: start
    model.zero_grad()
    counts, total = session.count(batches), 0.0
    for batch in batches:
        model(**batch)
        loss = session.loss(batch, counts)
        total += loss.item()
        loss.backward()
    session.gradients_ready()
    params = [p for p in model.parameters() if p.requires_grad]
    return total, torch.cat([p.grad.double().flatten() if p.grad is not None else 0 * p.flatten() for p in params])


def test_a_row_is_chosen_with_the_share_as_its_probability_exactly():
    """Over a grid of starts that meets every case the same number of times; and with no run of bad luck."""
    for share, grid in ((0.25, 4), (0.3, 10), (2 / 3, 3), (0.9, 10)):
        starts = [(i + 0.5) / grid for i in range(grid)]
        drawn = [chosen(start, share, 0, 40) for start in starts]
        times = [sum(row in rows for rows in drawn) for row in range(40)]
        assert times == [round(share * grid)] * 40
        assert all(abs(len(rows) - 40 * share) < 1 for rows in drawn)
        for start, rows in zip(starts, drawn, strict=True):
            parts = [(0, 7), (7, 7), (7, 20), (20, 40)]
            assert [first + i for first, end in parts for i in chosen(start, share, first, end - first)] == rows
    assert chosen(0.9, 1.0, 3, 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("method", [TargetMaskedKL, FullKL])
def test_the_mean_over_all_draws_is_the_full_loss_and_its_gradient(method):
    model, batches = student(), tiny.batches(2, size=4)
    settings = {"strength": 1.5, "positions": "all"}
    full, gradient = step(session_of(model, method(**settings)), model, batches)
    for share, grid in ((0.25, 4), (0.4, 5)):
        session = session_of(model, method(**settings, reference_share=share))
        draws = [step(session, model, batches, (i + 0.5) / grid) for i in range(grid)]
        losses, gradients = zip(*draws, strict=True)
        assert sum(losses) / grid == pytest.approx(full, rel=1e-6)  # losses are added up in float32
        mean = torch.stack(gradients).mean(0)
        assert (mean - gradient).norm() <= 1e-6 * gradient.norm()
        assert min(abs(loss - full) for loss in losses) > 1e-3 * full  # no draw alone is right


def test_the_mean_over_many_seeds_is_the_full_loss():
    model, batches = student(), tiny.batches(1, size=6)
    full, _ = step(session_of(model, FullKL()), model, batches)
    session = session_of(model, FullKL(reference_share=0.3))
    losses = torch.tensor([step(session, model, batches)[0] for _ in range(200)])  # another draw in every step
    error = losses.std() / len(losses) ** 0.5
    assert 0 < error < 0.05 * full
    assert (losses.mean() - full).abs() < 4 * error


@pytest.mark.parametrize("layers", ["all", "upper"])
def test_the_base_runs_on_the_chosen_rows_alone(layers):
    """Its hidden states there are those of the whole pass; with shared lower layers, too."""
    model = student(
        layers=4, **({"layers_to_transform": [3], "target_modules": ["q_proj"]} if layers == "upper" else {})
    )
    session = session_of(model, FullKL(reference_share=0.5))
    assert (session.tap.prefix.why_not == "") == (layers == "upper")
    rows = []
    session.tap.backbone.register_forward_hook(
        lambda module, args, output: None if torch.is_grad_enabled() else rows.append(len(output[0]))
    )
    batch = tiny.batches(1, size=5)[0]
    for number in range(3):
        model(**batch)
        task = session.take(batch).task
        places = chosen(session.sampling.start(number), 0.5, 0, 5)
        ours = task.reference_hidden
        assert rows.pop() == len(places) == len(task.hidden)
        assert task.host_factor == 2.0
        assert torch.equal(task.supervision.completion, (batch["labels"][places, 1:] != -100))
        model(**batch)
        call = session.tap.take()
        theirs = session.reference.hidden(session.tap, call)[places]
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()
        rows.clear()
        session.gradients_ready()


def test_a_micro_batch_without_a_chosen_row_runs_no_base():
    model, batches = student(), tiny.batches(4, size=1)
    session = session_of(model, TargetMaskedKL(reference_share=0.25))
    passes = []
    session.tap.backbone.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    loss, gradient = step(session, model, batches, start=0.6)
    assert (passes.count(True), passes.count(False)) == (4, 1)
    assert loss > 0
    assert gradient.norm() > 0
    loss, gradient = step(session, model, batches[:1], start=0.1)
    assert loss == 0.0
    assert gradient.norm() == 0


def test_a_step_without_a_row_is_said_once():
    """Of n rows on a process n · share are chosen, to within one: fewer than one is none, sooner or later."""
    model, batches = student(), tiny.batches(1, size=2)
    session = session_of(model, TargetMaskedKL(reference_share=0.25))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for start in (0.1, 0.9, 0.1, 0.1, 0.9):
            step(session, model, batches, start=start)
    said = [str(each.message) for each in told if "drawn" in str(each.message)]
    assert len(said) == 1
    assert said[0].startswith("None of the 2 sequences that a step had on this process was drawn")
    enough = session_of(model, TargetMaskedKL(reference_share=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = [step(enough, model, batches, start=start)[0] for start in (0.1, 0.4, 0.6, 0.99)]
    assert min(losses) > 0


def test_the_split_of_a_step_changes_nothing():
    model, (batch,) = student(), tiny.batches(1, size=8)
    results = []
    for split in (1, 2, 4, 8):
        parts = [{k: v.chunk(split)[i] for k, v in batch.items()} for i in range(split)]
        results.append(step(session_of(model, TargetMaskedKL(reference_share=0.3), seed=3), model, parts))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert (gradient - results[0][1]).norm() <= 1e-6 * results[0][1].norm()


def test_draws_follow_from_seed_step_and_rank_alone(monkeypatch):
    def starts(seed):
        return [Sampling(0.5, seed).start(step) for step in range(200)]

    ours = starts(1)
    assert ours == starts(1)
    assert len(set(ours)) == 200
    assert set(ours).isdisjoint(starts(2))
    assert 0.4 < sum(ours) / 200 < 0.6
    monkeypatch.setattr(sampling, "rank", lambda: 1)
    assert set(ours).isdisjoint(starts(1))


def test_a_whole_share_is_the_code_that_was_there():
    """Share 1 draws nothing and cuts nothing; strength 0 leaves the host's own run."""
    model = student(dtype=torch.float32)
    assert session_of(model, TargetMaskedKL(reference_share=1)).sampling is None
    assert session_of(model, TargetMaskedKL(strength=0, reference_share=0.5)).sampling is None
    alone = runs.train("sft", None)
    off = runs.train("sft", [TargetMaskedKL(strength=0, reference_share=0.25)])
    assert runs.identical(off.model, alone.model)


@pytest.mark.parametrize("case", ["sft", "sft, packed", "dpo"])
def test_it_trains_on_hosts_and_resumes_bit_for_bit(tmp_path, case):
    packed = {"packing": True, "max_length": 24} if "packed" in case else {}
    options = packed | {"steps": 4, "save_strategy": "steps", "save_steps": 2}
    method = TargetMaskedKL(strength=2.0, reference_share=0.5)
    straight = runs.train(case[:3], [method], output_dir=str(tmp_path / "a"), **options)
    resumed = runs.trainer(case[:3], output_dir=str(tmp_path / "b"), **options)
    session = holdfast.attach(resumed, [method])
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert runs.identical(resumed.model, straight.model)
    assert "reference forward on 0.5 of the task's sequences, drawn anew in every step" in session.explain()
    held = [e["holdfast/target_masked_kl/divergence"] for e in straight.state.log_history[:4]]
    assert held[0] == 0.0
    assert held[-1] > 0
    whole = runs.train(
        case[:3], [TargetMaskedKL(strength=2.0)], steps=4, **{k: options[k] for k in options if "ma" in k}
    )
    assert not runs.identical(straight.model, whole.model)


def test_arguments_that_cannot_be_cut_make_the_base_run_whole_and_say_so():
    """Lengths of packed documents, say: which of them is whose is not to be told."""
    model, (batch,) = student(), tiny.batches(1, size=4)
    tap = Tap(model)
    call = tap.run((), tap.inputs(batch))
    assert not_of_rows(call) is None
    assert len(cut(call, [2]).kwargs["input_ids"]) == 1
    for name, value in (
        ("cu_seq_lens_q", torch.arange(4)),
        ("position_ids", torch.zeros(4, 4, 10)),
        ("odd", object()),
        ("attention_mask", {"full": torch.ones(4, 1, 10, 10), "odd": torch.ones(3, 10)}),
    ):
        call.kwargs[name] = value
        assert not_of_rows(call) == name
        del call.kwargs[name]
    call.kwargs["attention_mask"] = {"full": torch.ones(4, 1, 10, 10), "sliding": None}
    assert not_of_rows(call) is None
    assert cut(call, [0, 3]).kwargs["attention_mask"]["full"].shape == (2, 1, 10, 10)

    session = session_of(model, FullKL(reference_share=0.5))
    full, _ = step(session, model, [batch], start=0.5)
    rows = []

    def odd(module, args, kwargs):
        return args, kwargs | {"odd": torch.arange(3)}

    session.tap.backbone.register_forward_pre_hook(odd, with_kwargs=True, prepend=True)
    session.tap.backbone.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    with pytest.warns(UserWarning, match="called with 'odd'.*runs on all sequences"):
        again, _ = step(session, model, [batch], start=0.5)
    assert again == pytest.approx(full, rel=1e-6)
    assert rows == [4, 4]


def test_faults_are_told_at_once():
    for share in (0.0, 1.5, -1, "half", True, float("nan")):
        with pytest.raises(ConfigError, match="reference_share must be a number above 0, and at most 1"):
            FullKL(reference_share=share)
    with pytest.raises(ConfigError, match="is of the task's sequences: on='retain' reads others"):
        FullKL(on="retain", reference_share=0.5)
    with pytest.raises(ConfigError, match="normalise='kept' divides by tokens that only the base knows"):
        TargetMaskedKL(exclusion=1e-4, normalise="kept", reference_share=0.5)
    with pytest.raises(WrongSetup, match="differ in reference_share"):
        session_of(student(), FullKL(reference_share=0.5), TargetMaskedKL())


def test_two_processes_are_right_in_expectation():
    script = Path(__file__).parent / "sampled_run.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
