"""What the repository shows to people runs: every recipe is valid, lab recipes train, examples run."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from holdfast.recipe.config import load
from holdfast.recipe.run import run

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_valid(path, here):
    assert load(path).stages


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem.startswith("lab_")], ids=lambda p: p.stem)
def test_lab_recipes_train_offline(path, here):
    """Cut to a few steps here; the whole recipes take a minute or two each."""
    short = here / path.name
    short.write_text(re.sub(r"max_steps: \d+", "max_steps: 3", path.read_text()))
    result = run(load(short), print)
    before, *_, after = (entry.scores for entry in result.entries)
    assert before.keys() == after.keys()
    assert (result.folder / "adapter_config.json").is_file()


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_trl_example(here):
    new, old = example("trl_sft").main(steps=4)
    assert 0 <= new <= 1
    assert old > 0.5


@pytest.mark.slow
def test_the_plain_loop_example(here):
    new, old = example("plain_loop").main(steps=6)
    assert 0 <= new <= 1
    assert old > 0.5
