"""`holdfast doctor RECIPE` from the command line: what it prints, its JSON, its exit code; and the page of numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from holdfast.cli import app
from holdfast.cli.doctor import size_of
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "lab_sft.yaml"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder to work in: the output folder of the recipe is looked at."""
    monkeypatch.chdir(tmp_path)


def called(*arguments):
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.output


def test_a_recipe_that_can_run():
    code, told = called(RECIPE)
    assert code == 0
    for part in ("proven: logits", "target_masked_kl", "base weights", "the loss's workspace", "it can run: 0 faults"):
        assert part in told
    assert list(Path.cwd().iterdir()) == []


def test_all_of_it_as_json_and_a_fault_as_exit_code():
    code, told = called(RECIPE, "--json", "--memory", "1MiB", "--length", "32", "--batch", "2")
    found = json.loads(told)
    assert code == 1
    assert found["works"] is False
    assert found["device"]["memory"] == 2**20
    (stage,) = found["memory"]
    assert stage["tokens"] == 64
    assert {"name", "size", "formula", "when", "exact", "of"} == set(stage["parts"][0])
    assert [each["about"] for each in found["findings"] if each["status"] == "fault"] == ["stage 1 (sft): memory"]


def test_a_recipe_with_faults_tells_all_of_them_and_fails():
    Path("r.yaml").write_text("modle: x\nstages: [{trainer: sft, data: gone.jsonl}]\n")
    code, told = called("r.yaml")
    assert code == 1
    for part in ("Did you mean 'model'?", "no file 'gone.jsonl'", "it cannot run as it is"):
        assert part in told


def test_options_need_a_recipe_and_sizes_a_unit():
    code, told = called("--memory", "80GiB")
    assert code == 2
    assert "about a recipe" in told
    code, told = called(RECIPE, "--memory", "80")
    assert code == 2
    assert "a number with its unit" in told
    code, told = called(RECIPE, "--launch", "gone.yaml")
    assert code == 2
    assert "there is no file gone.yaml" in told


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("1.5 GB", 15 * 10**8), ("512MiB", 2**29)])
def test_sizes(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "80", "-3GiB", "80gib", "x GiB"])
def test_what_is_no_size(text):
    with pytest.raises(typer.BadParameter):
        size_of(text)


@pytest.mark.slow
def test_the_page_is_what_the_script_would_write_now():
    from scripts import memory_page

    assert memory_page.PAGE.read_text() == memory_page.page()
