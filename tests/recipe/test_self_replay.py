"""Methods on the retain stream in a recipe: by name, by setting, and what is missing without retain data."""

from __future__ import annotations

import pytest
from holdfast.cli.train import plan
from holdfast.core.errors import ConfigError
from holdfast.methods import FullKL, SelfReplay, TargetMaskedKL
from holdfast.recipe.config import load
from holdfast.recipe.data import Data
from holdfast.recipe.run import run
from holdfast.retain.making import make
from holdfast.retain.pool import Pool
from holdfast.retain.settings import Settings
from transformers import AutoTokenizer, LlamaForCausalLM

SHORT = """\
model: {name: TINY, lora: {r: 4}}
stages:
  - {trainer: sft, data: {data: "lab:shift", samples: 16}, max_steps: 3, per_device_train_batch_size: 6,
     learning_rate: 5e-3, logging_steps: 1, report_to: none, disable_tqdm: true}
output: out
"""
RETAIN = 'retain: {data: "lab:retain", samples: 8}\n'


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("self_replay", SelfReplay()),
        ("recommended", SelfReplay()),
        ("{self_replay: {strength: 2, share: 0.2}}", SelfReplay(strength=2, share=0.2)),
        ("{full_kl: {on: retain}}", FullKL(on="retain")),
        ("{target_masked_kl: {on: retain, share: 0.5}}", TargetMaskedKL(on="retain", share=0.5)),
    ],
)
def test_a_recipe_names_the_stream(recipe, write, text, method):
    asked = recipe(SHORT + RETAIN + f"methods: [{text}]\n")
    assert asked.stages[0].methods == (method,)
    if isinstance(method, SelfReplay):  # it samples what it needs
        assert load(write(SHORT + f"methods: [{text}]\n")).stages[0].methods == (method,)
        return
    with pytest.raises(ConfigError, match=f"{method.name} needs retain data: add `retain:"):
        load(write(SHORT + f"methods: [{text}]\n"))


def test_faults_of_the_stream_stand_on_their_lines(write):
    with pytest.raises(ConfigError) as caught:
        load(write(SHORT + RETAIN + "methods:\n  - {full_kl: {on: both}}\n  - {self_replay: {share: 2}}\n"))
    told = "\n".join(caught.value.faults)
    assert "line 8: full_kl: on must be one of task, retain, got 'both'" in told
    assert "line 9: self_replay: share must be a number between 0 and 1, got 2" in told


@pytest.mark.parametrize("text", ["self_replay", "{full_kl: {on: retain}}"])
def test_a_recipe_runs_it(recipe, here, text):
    told = []
    run(recipe(SHORT + RETAIN + f"methods: [{text}]\n"), told.append)
    assert (here / "out/adapter/adapter_config.json").is_file()


def test_its_name_is_enough(recipe, here, monkeypatch):
    """`methods: [self_replay]`, and no retain data: the base writes a pool, of which the run tells."""
    monkeypatch.setenv("HOLDFAST_CACHE", str(here / "cache"))
    asked, told = recipe(SHORT + "methods: [self_replay]\n"), []
    assert "  retain: a pool that the base writes before training (docs/pool.md)" in plan(asked)
    run(asked, told.append)
    assert (here / "out/adapter/adapter_config.json").is_file()
    (folder,) = (here / "cache/pools").iterdir()
    assert f"come from the pool of {len(Pool.load(folder))}," in "\n".join(told)


def test_a_pool_is_retain_data(recipe, here, tiny):
    """Its folder, as it is; for the methods it is not tokenised again, and a broken one is a fault of the recipe."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    pool = make(model, tokenizer, Settings(n=12, max_tokens=6))
    pool.save(here / "mine")
    told = []
    run(recipe(SHORT + "retain: mine\nmethods: [self_replay]\n"), told.append)
    assert f"come from the pool of {len(pool)}," in "\n".join(told)
    assert Data("mine").digest() == pool.digest[:16]
    assert Data("mine", samples=3).rows()["input_ids"] == [list(kept.input_ids) for kept in pool.sequences[:3]]
    (here / "mine" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="not the manifest of a pool"):
        recipe(SHORT + "retain: mine\nmethods: [self_replay]\n")
