"""The shipped weights come from this recipe: same fingerprint, same first losses in both phases, and the right size."""

import json
from pathlib import Path

import pytest
import torch
from holdfast import lab
from holdfast.lab import build
from holdfast.lab import provenance as provenance_table


def provenance(name):
    return json.loads((lab.path(name) / "provenance.json").read_text())


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", lab.NAMES)
def test_fingerprint(name):
    assert provenance(name)["recipe"] == build.fingerprint(provenance(name)["seed"]), (
        "The recipe has changed since the weights were built: run `holdfast lab build`."
    )


@pytest.mark.parametrize("name", lab.NAMES)
def test_first_losses_are_those_of_the_shipped_weights(name):
    """Pretraining starts from the seed, safety training from the shipped pretrained weights: both are tied down."""
    record, number = provenance(name), lab.NAMES.index(name)
    tokenizer = build.build_tokenizer()
    model = build.initial_model(tokenizer, record["seed"]) if number == 0 else lab.load("lab-pretrained")[0]
    phase, mix = build.PHASES[number]
    losses = list(build.train(model, tokenizer, mix, phase, record["seed"], stop=10))
    assert losses == pytest.approx(record["first_losses"][:10], rel=2e-3)  # another machine sums in another order


def test_short_build_is_deterministic_and_loads(tmp_path):
    state = torch.get_rng_state()
    builds = [build.build(tmp_path / str(run), seed=3, steps=3, progress=False) for run in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    for name in lab.NAMES:
        first, second = ((made[name] / "model.safetensors").read_bytes() for made in builds)
        assert first == second
    model, _ = lab.load(str(builds[0]["lab-aligned"]))
    assert model.dtype == torch.float32


@pytest.mark.parametrize("name", lab.NAMES)
def test_size_and_type(name):
    from transformers import AutoModelForCausalLM

    files = {file.name: file.stat().st_size for file in lab.path(name).iterdir()}
    assert files["model.safetensors"] < 2.2e6
    assert sum(files.values()) < 2.4e6
    model = AutoModelForCausalLM.from_pretrained(lab.path(name))
    assert model.dtype == torch.float32
    assert 0.9e6 < sum(p.numel() for p in model.parameters()) < 1.1e6


def test_the_documented_scores_are_those_of_the_weights():
    document = (Path(__file__).parents[2] / "docs" / "lab.md").read_text()
    assert provenance_table.table() in document, "run: python -m holdfast.lab.provenance docs/lab.md"
