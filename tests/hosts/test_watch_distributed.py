"""Two real processes: one measures, both decide alike, and nobody waits for ever."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from holdfast.drift.ledger import Ledger


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes say of every case, and the folder."""
    folder = tmp_path_factory.mktemp("watched")
    script = Path(__file__).parent / "watch_run.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LIMIT": "0.5"}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)], folder


def test_watching_changes_neither_process(found):
    (first, second), _ = found
    assert first["watched"]["weights"] == second["watched"]["weights"] == first["alone"]["weights"]
    assert [look[0] for look in first["watched"]["looks"]] == [1, 2, 3, 4]


@pytest.mark.parametrize("case", ["watched", "stopped", "put back", "dense"])
def test_both_know_and_do_the_same(found, case):
    (first, second), _ = found
    assert first[case]["fault"] == ""
    assert {**first[case], "told": []} == second[case]


def test_both_stop_at_the_same_step_and_one_says_so(found):
    (first, second), folder = found
    for case, name in (("stopped", "stop"), ("dense", "dense")):
        assert first[case]["step"] == second[case]["step"] == 1
        assert "The training stops here" in first[case]["told"][-1]
        assert (folder / name / "checkpoint-1").is_dir()


def test_both_have_the_weights_that_were_put_back(found):
    (first, second), folder = found
    within = [look[0] for look in first["put back"]["looks"] if not look[2]]
    assert first["put back"]["looks"][-1][2], "it must end beyond its budget"
    assert f"of step {within[-1]} are put back" in first["put back"]["told"][-1]
    assert first["put back"]["weights"] == second["put back"]["weights"] != first["alone"]["weights"]
    assert (folder / "keep" / "within-budget.safetensors").is_file()


def test_a_fault_of_the_one_that_measures_ends_both(found):
    (first, second), _ = found
    assert first["faulty"]["fault"].startswith("GateError")
    assert "could not be measured in the main process: GateError" in second["faulty"]["fault"]
    assert first["faulty"]["step"] == second["faulty"]["step"] == 0


def test_the_ledger_is_written_once(found):
    _, folder = found
    entries = Ledger(folder / "log" / "ledger.jsonl").entries("drift while training")
    assert [entry.settings.get("step") for entry in entries] == [None, 1, 2, 3, 4]
