"""What a benchmark writes, and how a run that was stopped goes on, in a git repository of its own."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
ASKED = Namespace(only=None, again=False, quick=False)
ROW = {"variant": "ours", "peer": "theirs", "metric": "cpu seconds, ratio", "tokens": 128, "value": 0.123456}


@pytest.fixture
def record(monkeypatch, tmp_path):
    """The module, at work in a repository with one commit."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import record

    monkeypatch.setattr(record, "ROOT", tmp_path)
    for name in ("src/code.py", "benchmarks/time.py", "docs/page.md"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("1")
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return record


def git(root, *arguments):
    names = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *names, *arguments], cwd=root, check=True, capture_output=True)


def commit(root):
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "a change")


def test_a_row_measured_again_replaces_itself_and_no_other(record, tmp_path):
    path = tmp_path / "results" / "a.csv"
    record.write([ROW, {**ROW, "tokens": 2048, "value": 0.5}], path)
    record.write([{**ROW, "value": 0.25, "low": 0.2, "high": 0.3}], path)
    found = {row["tokens"]: (row["value"], row["low"], row["high"]) for row in record.read(path)}
    assert found == {"128": ("0.25", "0.2", "0.3"), "2048": ("0.5", "", "")}


def test_a_row_from_before_there_were_shapes_is_replaced_by_its_successor(record, tmp_path):
    record.write([ROW], tmp_path / "a.csv")
    record.write([{**ROW, "shape": "64/1000", "value": 0.5}], tmp_path / "a.csv")
    assert [(row["shape"], row["value"]) for row in record.read(tmp_path / "a.csv")] == [("64/1000", "0.5")]


def test_what_a_job_measures_no_more_is_dropped(record, tmp_path):
    record.write([ROW, {**ROW, "variant": "old"}], tmp_path / "a.csv", "time")
    record.write([{**ROW, "variant": "kept"}], tmp_path / "a.csv", "memory")
    record.write([ROW], tmp_path / "a.csv", "time")
    assert sorted(row["variant"] for row in record.read(tmp_path / "a.csv")) == ["kept", "ours"]


def test_a_word_in_place_of_a_number_stays_a_word(record, tmp_path):
    record.write([{**ROW, "value": record.NOT_INSTALLED}], tmp_path / "a.csv")
    assert record.read(tmp_path / "a.csv")[0]["value"] == "not installed"


def test_done_means_measured_with_this_code(record, tmp_path, monkeypatch):
    path = tmp_path / "results" / "a.csv"
    assert not record.done(path, "time")
    record.write([ROW], path, "time")
    assert record.done(path, "time")
    assert not record.done(path, "memory")
    commit(tmp_path)  # the results
    assert record.done(path, "time")
    (tmp_path / "docs/page.md").write_text("2")
    commit(tmp_path)
    assert record.done(path, "time")
    (tmp_path / "src/code.py").write_text("2")
    assert not record.done(path, "time")  # uncommitted
    commit(tmp_path)
    assert not record.done(path, "time")  # other code
    record.write([ROW], path, "time")
    assert record.done(path, "time")
    monkeypatch.setattr(record.torch, "get_num_threads", lambda: 7)
    assert not record.done(path, "time")


def test_uncommitted_code_is_said_and_never_done(record, tmp_path):
    (tmp_path / "benchmarks/new.py").write_text("1")
    record.write([ROW], tmp_path / "a.csv", "time")
    assert record.read(tmp_path / "a.csv")[0]["commit"].endswith("+uncommitted")
    commit(tmp_path)
    assert not record.done(tmp_path / "a.csv", "time")


def test_a_run_that_was_stopped_goes_on(record, tmp_path):
    path, ran = tmp_path / "results" / "a.csv", []

    def job(name, *, stopped=False):
        def work():
            ran.append(name)
            if stopped:
                raise KeyboardInterrupt
            return [{**ROW, "variant": name}]

        return work

    with pytest.raises(KeyboardInterrupt):
        record.carry_out({"first": job("first"), "second": job("second", stopped=True)}, path, ASKED)
    record.carry_out({"first": job("first"), "second": job("second")}, path, ASKED)
    assert ran == ["first", "second", "second"]
    assert [row["variant"] for row in record.read(path)] == ["first", "second"]
    record.carry_out({"first": job("first")}, path, Namespace(only=None, again=True, quick=False))
    assert ran[-1] == "first"


def test_a_job_that_lacks_memory_is_left_out_and_said(record, tmp_path, capsys):
    jobs = {"large": lambda: record.need_memory(1e6), "small": lambda: [ROW]}
    with pytest.raises(SystemExit, match="Not measured for want of memory: large"):
        record.carry_out(jobs, tmp_path / "a.csv", ASKED)
    assert "1000000 GiB are needed" in capsys.readouterr().out
    assert [row["job"] for row in record.read(tmp_path / "a.csv")] == ["small"]


def test_asking_for_a_job_that_is_not_there_names_those_that_are(record, tmp_path):
    with pytest.raises(SystemExit, match=r"--only tim is in the name of no job. There are: memory; accuracy"):
        record.carry_out({"memory": list, "accuracy": list}, tmp_path / "a.csv", Namespace(only=["tim"], again=False))


def test_quick_writes_nothing(record, tmp_path):
    record.carry_out({"a": lambda: [ROW]}, tmp_path / "a.csv", Namespace(only=None, again=False, quick=True))
    assert not (tmp_path / "a.csv").exists()


def test_the_peak_is_what_the_work_takes(record):
    def work():
        block = record.torch.ones(128 * 2**18)  # 128 MiB, more than malloc ever keeps
        return float(block.sum())

    assert 127 <= record.peak_mib(work) <= 140


def test_every_script_with_results_is_run_by_make_bench(record):
    import run

    with_results = {path.stem for path in FOLDER.glob("*.py") if "\nRESULTS = " in path.read_text()}
    assert with_results == {script.name for script in run.SCRIPTS if (FOLDER / f"{script.name}.py").exists()}
    listed = (FOLDER / "README.md").read_text()
    for script in run.SCRIPTS:
        assert f"| {script.name}.py |" in listed
        assert f"{script.minutes} minutes" in listed.split(f"| {script.name}.py |")[1].split("\n")[0]


def test_run_names_the_scripts_and_their_state(record, monkeypatch, capsys):
    import run

    monkeypatch.setattr(sys, "argv", ["run.py", "--list", "--only", "fisher", "gpu"])
    run.main()
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "fisher: B14; 6 minutes, 2 GiB; to be measured"
    assert told[1].startswith("gpu: G1; 10 minutes, 4 GiB; ")
