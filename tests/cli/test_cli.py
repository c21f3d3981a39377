from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from holdfast.cli import app
from holdfast.cli.doctor import TESTED
from holdfast.cli.methods import documented
from holdfast.core import registry
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]


def called(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    return result.exit_code, result.output


def shell(*arguments, cwd=ROOT):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "holdfast", *map(str, arguments)],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "arguments", [(), ("train",), ("methods",), ("methods", "show"), ("lab", "build"), ("doctor",)]
)
def test_every_verb_explains_itself(arguments):
    code, told = called(*arguments, "--help")
    assert code == 0
    assert "Usage" in told


def test_help_needs_no_heavy_import():
    """`holdfast --help` must come at once: no torch, no transformers, no numpy."""
    code = (
        "import sys, holdfast.cli; print([m for m in ('torch', 'transformers', 'numpy', 'yaml') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "[]"


def test_methods_lists_each_in_one_line():
    code, told = called("methods")
    assert code == 0
    for name, method in registry.methods().items():
        (line,) = re.findall(rf"^{name}  .*$", told.split("Presets")[0], re.M) or [""]
        line = line or next(each for each in told.splitlines() if each.startswith(name))
        assert method.space in line


@pytest.mark.parametrize("name", sorted(registry.methods()))
def test_show_gives_equation_settings_and_defaults(name):
    code, told = called("methods", "show", name)
    assert code == 0
    assert registry.methods()[name].space in told
    acts_on_gradients = registry.methods()[name].space == "gradient"
    assert f"strength: float{'' if acts_on_gradients else ' | Auto'} = " in told
    assert ("strength: auto, budget: 0.02" in told) == ("  budget: float" in told) == (not acts_on_gradients)
    assert f"methods: [{{{name}:" in told


@pytest.mark.parametrize("name", sorted(registry.methods()))
def test_every_setting_is_explained(name):
    method = registry.methods()[name]
    assert {field.name for field in fields(method)} <= set(documented(method))


def test_a_misspelt_method_is_guessed_without_a_traceback():
    code, _, told = shell("methods", "show", "target_maskd_kl")
    assert code == 1
    assert "Did you mean 'target_masked_kl'?" in told
    assert "Traceback" not in told


def test_check_says_what_would_run_and_touches_nothing(tmp_path):
    code, told, _ = shell("train", ROOT / "recipes/lab_two_stages.yaml", "--check", cwd=tmp_path)
    assert code == 0
    for part in ("stage 1: sft on lab:safety_sft", "stage 2: dpo", "agem(", "reference: base", "output: runs/"):
        assert part in told
    assert list(tmp_path.iterdir()) == []


def test_check_tells_of_replay(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {name: lab-pretrained, lora: {r: 4}}\n"
        'stages: [{trainer: sft, data: "lab:safety_sft", replay: 0.25}]\n'
        'retain: "lab:retain_chat"\n'
        "output: out\n"
    )
    code, told = called("train", path, "--check")
    assert code == 0, told
    assert "replay: 25% of its rows" in told
    assert "note:" not in told  # the retain data has a use


def test_baselines_that_are_no_method_are_listed():
    _, told = called("methods")
    assert re.search(r"^replay .*`replay: 0.3`", told, re.M)
    assert re.search(r"^adapter scaling .*`scales: ", told, re.M)


def test_check_of_a_bad_recipe_tells_every_fault_and_fails(tmp_path):
    (tmp_path / "r.yaml").write_text("modle: x\nstages: [{trainer: sft, data: gone.jsonl, lerning_rate: 1}]\n")
    code, _, told = shell("train", "r.yaml", "--check", cwd=tmp_path)
    assert code == 1
    for part in ("Did you mean 'model'?", "no file 'gone.jsonl'", "Did you mean 'learning_rate'?", "needs 'output'"):
        assert part in told
    assert "Traceback" not in told


def test_doctor_knows_the_versions_of_the_constraints():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: pinned[name] for name in TESTED} == TESTED
    code, told = called("doctor")
    assert "device:" in told
    assert code == ("missing" in told)


def test_lab_show_names_models_and_tasks():
    code, told = called("lab", "show")
    assert code == 0
    for part in ("lab-aligned", "lab-pretrained", "lab:shift"):
        assert part in told


@pytest.mark.slow
def test_lab_build_makes_both_models(tmp_path):
    code, told = called("lab", "build", tmp_path, "--steps", "2")
    assert code == 0, told
    for name in ("lab-pretrained", "lab-aligned"):
        assert (tmp_path / name / "model.safetensors").is_file()
        assert str(tmp_path / name) in told
