"""The demo from end to end, with two steps a training: every arm, the ledger, the table, the figure, the page."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from holdfast.drift.ledger import Ledger
from holdfast.recipe import demo


def run(output: Path, *options: str) -> str:
    command = [
        Path(sys.executable).parent / "holdfast",
        "demo",
        "--output",
        str(output),
        "--steps",
        "2",
        "--items",
        "3",
    ]
    done = subprocess.run([*command, "--seeds", "1", *options], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_baseline_tries_most_settings_and_trains_as_long_as_any():
    jobs = demo.jobs(seeds=2)
    own = {arm: [j for j in jobs if j.arm == arm and j.seed == 1] for arm in {j.arm for j in jobs}}
    tried = {arm: len({tuple(j.settings(1.0).items()) for j in some}) for arm, some in own.items()}
    assert tried == {"plain LoRA": 4, "full KL": 3, "TMKL": 3, "TMKL + prompt": 3, "self-replay": 3}
    assert {j.seed for j in jobs} == {0, 1}
    assert {arm: max(j.length for j in some) for arm, some in own.items() if max(j.length for j in some) > 1} == {
        "plain LoRA": 2, "self-replay": 2,
    }  # fmt: skip


@pytest.mark.slow
def test_demo_and_its_continuation(tmp_path):
    said = run(tmp_path)
    for arm in ("the base, untuned", "TMKL + prompt", "full KL", "self-replay", "plain LoRA"):
        assert arm in said
    assert "within noise" in said
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    page = (tmp_path / "report.html").read_text()
    assert "TMKL + prompt" in page
    ledger = Ledger(tmp_path / "ledger.jsonl")
    entries = ledger.entries("demo")
    assert len(entries) == 2 + len(demo.jobs(1)) * len(demo.SCALES) * 2
    # as after a kill: the last run is lost, and is the only one that is done again
    lines = ledger.path.read_text().splitlines(keepends=True)
    ledger.path.write_text("".join(lines[:-6]))
    again = run(tmp_path)
    assert "15 of 16 runs are in" in again
    assert {e.key for e in Ledger(ledger.path).entries("demo")} == {e.key for e in entries}
    assert not demo.measured_otherwise(entries, steps=2, items=3)
    for options in ({"steps": 3, "items": 3}, {"steps": 2, "items": 4}):
        assert demo.measured_otherwise(entries, **options)
    short = [entry for entry in entries if entry.settings.get("length") == 1]
    older = [replace(entry, settings={**entry.settings, "length": None}) for entry in short]
    assert demo.measured_otherwise(older, steps=2, items=3)
    program = Path(sys.executable).parent / "holdfast"
    other = subprocess.run([program, "demo", "--output", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert other.returncode == 1
    assert "Start over with --fresh" in other.stderr
    kept = ledger.path.read_text().splitlines(keepends=True)
    assert kept[: len(lines) - 6] == lines[:-6]
