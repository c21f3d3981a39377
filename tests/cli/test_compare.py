"""`holdfast compare` from the command line: what it says before, and what it says and writes at the end."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from holdfast.analysis.frontier import at_matched_learning, compare
from holdfast.cli import app
from holdfast.cli.compare import failed
from holdfast.cli.kept import kept_table
from holdfast.drift.ledger import Entry, Score
from rich.console import Console
from typer.testing import CliRunner

RECIPE = """\
model: {name: lab-aligned, lora: {r: 8, lora_alpha: 16}}
stages:
  - {trainer: sft, data: {data: "lab:shift", samples: 64}, max_steps: 6, per_device_train_batch_size: 8,
     lr_scheduler_type: constant}
evaluate:
  validation:
    new_task: {data: "lab:shift", split: validation, samples: 8}
    old_skills: {data: "lab:retain_chat", split: validation, samples: 8}
  test:
    new_task: {data: "lab:shift", split: test, samples: 8}
    old_skills: {data: "lab:retain_chat", split: test, samples: 8}
compare:
  learn: new_task
  keep: [old_skills]
  seeds: [0, 1]
  scales: [0.5, 1.0]
  arms:
    plain LoRA: {learning_rate: [2e-3, 8e-3]}
    update decay: {methods: [update_decay], learning_rate: 8e-3, strength: [0.001]}
output: out
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def called(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, " ".join(result.output.split()), result.exception


def test_check_says_what_there_will_be(here):
    code, told, _ = called("compare", "recipe.yaml", "--check", "--processes", "2")
    assert code == 0
    assert "arm plain LoRA (the baseline): 2 settings: learning_rate 0.002; learning_rate 0.008" in told
    assert "matched by new_task_loss; compared by old_skills_loss" in told
    assert "6 runs: 3 settings, seeds 0, 1" in told
    assert "12 points" in told
    assert "6 runs are left, 2 at a time: how long" in told
    assert "known when the first of them is finished" in told
    assert "--retry-failed" not in told
    assert "2 seeds only: this is a first look and no evidence" in told
    assert not (here / "out").exists()


def test_seeds_that_fail_alike_are_told_together():
    entries = [
        Entry("e", "too fast", {"rate": rate, "scale": scale}, seed, "test", {}, status="failed", error=error,
              environment={})
        for rate, error in ((1, "diverged"), (2, "no memory")) for scale in (0.5, 1.0) for seed in (1, 0)
    ]  # fmt: skip
    assert failed(entries[:-1]) == [
        "failed: too fast, rate 1, seeds 0, 1: diverged", "failed: too fast, rate 2, seeds 0, 1: no memory"
    ]  # fmt: skip


def test_the_table_shows_missing_seeds_and_arms_and_names_as_they_are():
    def two(arm, learned, kept, seed=0, **more):
        scores = {"adaptation": Score(learned), "skills": Score(kept)}
        return [Entry("e", arm, {}, seed, split, scores, environment={}, **more) for split in ("validation", "test")]

    entries = two("base", 0.0, 1.0) + two("[red]plain", 0.8, 0.5) + two("[red]plain", 0.3, 0.5, seed=1)
    entries.append(Entry("e", "lost", {}, 0, "test", {}, status="failed", error="why", environment={}))
    readings = at_matched_learning(entries, levels=[0.4])
    table = kept_table(entries, readings, compare(readings, "[red]plain"), "[red]plain", "adaptation", ["skills"])
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    told = " ".join(console.file.getvalue().split())
    assert "noise from [red]plain" in told
    assert "│ [red]plain │ 0.40 │ 0.75 (1 of 2 seeds) │ 1 (1) │" in told
    assert "│ lost │ no finished run │" in told


def test_the_two_verbs_send_their_recipes_to_each_other(here):
    _, _, error = called("train", "recipe.yaml")
    assert "holdfast compare recipe.yaml" in str(error)
    (here / "one.yaml").write_text(RECIPE.split("compare:")[0] + "output: out\n")
    _, _, error = called("compare", "one.yaml")
    assert "Run it with `holdfast train`" in str(error)


@pytest.mark.slow
def test_a_comparison_from_end_to_end(here):
    command = [sys.executable, "-m", "holdfast", "compare", "recipe.yaml"]
    done = subprocess.run([*command, "--processes", "2"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    told = " ".join(done.stdout.split())
    for part in ("Kept at equal learning", "New task loss", "Old skills loss", "the base, untuned", "plain LoRA",
                 "update decay", "2 (4)", "1 (2)", "from plain LoRA are within noise", "no evidence"):  # fmt: skip
        assert part in told, part
    assert (here / "out/frontier.png").stat().st_size > 10_000
    assert "New task loss" in (here / "out/report.html").read_text()
    table = (here / "out/table.md").read_text().splitlines()
    assert table[0].startswith("| score | at New task loss | arm | value | plain LoRA | difference | verdict |")
    assert len(table) == 2 + 3  # one arm, one score, three levels
    assert "\\toprule" in (here / "out/table.tex").read_text()
    again = subprocess.run([*command, "--check"], capture_output=True, text=True, timeout=600).stdout
    assert "0 runs are left: the table and the page are made of what is there" in again
    fronts = (here / "out/fronts.md").read_text()
    for part in ("## Area that an arm's front dominates", "## Settings that no other beats: Old skills loss"):
        assert f"{part}\n\n| " in fronts
    # levels lie on the way down from the base's loss to the baseline's best: more learning is a lower loss
    levels = [float(line.split("|")[2]) for line in table[2:]]
    assert levels == sorted(levels, reverse=True)
