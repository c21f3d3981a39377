"""`holdfast cache`: built ahead from a recipe, found by training, refused where the data has changed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from holdfast.cli import app
from holdfast.core.errors import ConfigError, HoldfastError, WrongSetup
from holdfast.recipe.compare import plan
from holdfast.recipe.config import load
from holdfast.recipe.run import run
from holdfast.retain.task_folder import contents, manifest
from typer.testing import CliRunner

RECIPE = """
model: {{name: lab-aligned, lora: {{r: 4}}}}
stages:
  - {{trainer: sft, data: {{data: "lab:shift", samples: {samples}}}, max_steps: 4, per_device_train_batch_size: 4,
     learning_rate: 2e-3, dataloader_drop_last: true, save_strategy: "no", report_to: none, logging_steps: 1}}
methods: [{{target_masked_kl: {{strength: {strength}}}}}]
{cache}
output: {folder}/{output}
"""


def called(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def written(folder, name="recipe", *, samples=14, strength=1.0, cache=None):
    file = folder / f"{name}.yaml"
    cache = f"cache: {{folder: {folder}/kept, dtype: float16}}" if cache is None else cache
    file.write_text(RECIPE.format(samples=samples, strength=strength, cache=cache, folder=folder, output=name))
    return file


def test_built_ahead_shown_and_used(tmp_path, monkeypatch):
    from holdfast.core.reference import AdapterOff

    file, ran, plain = written(tmp_path), [], AdapterOff.hidden
    monkeypatch.setattr(AdapterOff, "hidden", lambda *given: ran.append(1) or plain(*given))
    told = called("cache", "build", file, "--batch-size", 5)
    (kind,) = contents(tmp_path / "kept", manifest(tmp_path / "kept"))
    assert (kind.name, kind.sequences) == ("completion-target", 14)  # those that drop_last leaves out of an epoch too
    passes = len(ran)
    assert f"{kind.tokens:,}" in told
    assert "yes" in told
    shown = called("cache", "show", tmp_path / "kept")
    assert "float16" in shown
    assert "base weights: " in shown
    called("cache", "build", file)
    proofs = len(ran) - passes  # at attach, and none on the data
    assert 0 <= proofs < passes

    ran.clear()
    assert "kept in" in called("train", file)
    assert len(ran) == proofs
    again = written(tmp_path, "stronger", strength=3.0)
    ran.clear()
    called("train", again)
    assert len(ran) == proofs
    with pytest.raises(WrongSetup, match=r"of this batch are not in .*Run `holdfast cache build` again"):
        called("train", written(tmp_path, "more", samples=40))
    called("cache", "build", written(tmp_path, "more", samples=40))
    assert contents(tmp_path / "kept", manifest(tmp_path / "kept"))[0].sequences == 40


ARMS = """
evaluate:
  validation: {new: {data: "lab:shift", split: validation}, old: {data: "lab:retain", split: validation}}
  test: {new: {data: "lab:shift", split: test}, old: {data: "lab:retain", split: test}}
compare:
  learn: new
  keep: [old]
  seeds: [0]
  arms:
    masked: {strength: [1.0, 3.0]}
    full, wider: {methods: [full_kl], lora: {r: 8}}
    both: {methods: [target_masked_kl, full_kl]}
"""


def test_arms_of_a_comparison_share_a_folder(tmp_path):
    """One base, several methods: each arm keeps what it needs, and finds what others have kept."""
    (file := tmp_path / "arms.yaml").write_text(written(tmp_path, samples=8).read_text() + ARMS)
    ran = {}
    for number, job in enumerate(plan(load(file)).jobs):
        trainers = []
        recipe = replace(job.recipe, measured={}, output=tmp_path / f"job-{number}", source=file)
        run(recipe, print, lambda trainer, number, seen=trainers: seen.append(trainer))
        log = trainers[0].state.log_history
        ran[recipe.arm, number] = sum(entry.get("holdfast/cache/base_ran_for_tokens", 0) for entry in log)
    kinds = contents(tmp_path / "kept", manifest(tmp_path / "kept"))
    assert {kind.name: kind.sequences for kind in kinds} == {"completion-none": 8, "completion-target": 8}
    tokens = kinds[0].tokens
    assert ran == {("masked", 0): tokens, ("masked", 1): 0, ("full, wider", 2): tokens, ("both", 3): 0}


def test_what_cannot_be_built(tmp_path):
    with pytest.raises(ConfigError, match="add `cache: true`"):
        called("cache", "build", written(tmp_path, cache=""))
    retain = written(tmp_path).read_text().replace("target_masked_kl", "self_replay")
    (tmp_path / "retain.yaml").write_text(retain)
    with pytest.raises(ConfigError, match="no stage has a method that reads the base on the task's own sequences"):
        called("cache", "build", tmp_path / "retain.yaml")
    with pytest.raises(WrongSetup, match="Stage 2 keeps nothing; there is 1"):
        called("cache", "build", written(tmp_path), "--stage", 2)
    with pytest.raises(HoldfastError, match=r"is no cache of the task: it has no cache.json"):
        called("cache", "show", tmp_path)


def test_a_recipe_says_what_is_wrong_with_its_cache(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, cache="cache: {foldr: kept, dtype: bfloat16}"))
    assert [fault.split(": ", 1)[1] for fault in caught.value.faults] == [
        "cache has no setting 'foldr'. Did you mean 'folder'?",
        "cache: dtype must be float32 or float16 (bfloat16 loses a small KL), got 'bfloat16'",
    ]
    assert load(written(tmp_path, cache="cache: true")).cache is True
    assert load(written(tmp_path, cache="cache: kept")).cache == "kept"
    assert load(written(tmp_path, cache="")).cache is False
    told = called("train", written(tmp_path, cache="cache: true"), "--check")
    assert "cache: what the base says of the task is kept" in told


def test_help_teaches():
    told = called("cache", "build", "--help")
    for word in ("no epoch runs it", "goes on with", "accelerate launch", "neither do seeds, unless"):
        assert word in " ".join(told.split())
