"""The ledger keeps whole lines or none, refuses what it cannot vouch for, and knows what is done."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from holdfast.drift.ledger import Entry, Ledger, LedgerError, RunKey, Score, TornLine, environment


def entry(**changes):
    fields = {
        "experiment": "demo",
        "arm": "plain LoRA",
        "settings": {"learning_rate": 4e-3, "scale": 1.0},
        "seed": 0,
        "split": "test",
        "scores": {"skills": Score(0.75, items=(1, 1, 0, 1)), "story_perplexity": Score(8.5, standard_error=0.1)},
        "cost": {"train_seconds": 12.5},
    }
    return Entry(**(fields | changes))


def test_what_is_read_is_what_was_written(tmp_path):
    ledger = Ledger(tmp_path / "runs" / "ledger.jsonl")
    written = [entry(), entry(seed=1, settings={"grid": [1, 2], "name": "µ|\n", "nested": {"a": None}})]
    for one in written:
        ledger.append(one)
    assert ledger.entries() == written
    assert Ledger(ledger.path).entries() == written


def test_entries_are_filtered_and_failures_are_kept_apart(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(entry())
    ledger.append(entry(split="validation"))
    ledger.append(entry(arm="TMKL", status="failed", error="loss is NaN", scores={"skills": Score(math.nan)}))
    assert [one.split for one in ledger.entries(arm="plain LoRA")] == ["test", "validation"]
    assert [one.split for one in ledger.entries(split="test")] == ["test"]
    assert ledger.entries(experiment="another") == []
    failed = ledger.entries(status="failed")[0]
    assert failed.error == "loss is NaN"
    assert math.isnan(failed.scores["skills"].value)
    assert len(ledger.entries(status=None)) == 3
    for line in ledger.path.read_text().splitlines():  # strict JSON, for readers other than Python
        json.loads(line, parse_constant=pytest.fail)


def test_all_faults_of_an_entry_are_told_at_once():
    scores = {"skills": Score(math.nan), "rare": Score(0.5, n=3, standard_error=-1.0, items=(0, 1))}
    with pytest.raises(LedgerError) as told:
        entry(arm="", seed=0.5, settings={"x": object()}, scores=scores, cost={"train_seconds": -1}, time="yesterday")
    assert len(told.value.faults) == 8
    for part in ("arm", "seed", "settings['x']", "value is nan", "n is 3", "negative", "train_seconds", "yesterday"):
        assert part in str(told.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"status": "failed", "error": None}, "needs an error"),
        ({"error": "odd"}, "has no error"),
        ({"scores": {}}, "at least one score"),
        ({"scores": {"skills": 0.8}}, "must be a Score"),
        ({"settings": {"strength": math.inf}}, "JSON cannot hold"),
        ({"settings": {1: 2}}, "not a string"),
        ({"scores": {"skills": Score(math.inf)}}, "status='failed'"),
    ],
)
def test_an_entry_that_would_mislead_is_refused(changes, told):
    with pytest.raises(LedgerError, match=told):
        entry(**changes)


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(LedgerError, match="not a number"):
        Score("0.8")


def test_the_run_is_shared_by_splits_and_scales_and_by_nothing_else():
    run = entry().run
    assert run == entry(split="validation").run == entry(settings={"scale": 0.5, "learning_rate": 4e-3}).run
    assert run not in {entry(seed=1).run, entry(arm="TMKL").run, entry(settings={"learning_rate": 2e-3}).run}


def test_resuming_asks_only_for_what_is_missing(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for split in ("validation", "test"):
        ledger.append(entry(split=split))
    ledger.append(entry(seed=1, split="validation"))
    ledger.append(entry(seed=2, status="failed", error="stopped"))
    done = ledger.runs("demo")
    assert done == {RunKey.of("demo", "plain LoRA", {"scale": 1.0, "learning_rate": 4e-3}, 0)} == {entry().key}
    assert ledger.runs("another") == frozenset()


def test_a_future_schema_and_unknown_fields_are_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    record = json.loads(entry().to_json())
    path.write_text(
        json.dumps(record | {"schema": 3}) + "\n" + json.dumps(record | {"colour": "red"}) + "\n{}\nnot json\n"
    )
    with pytest.raises(LedgerError) as told:
        Ledger(path).entries()
    assert len(told.value.faults) == 4
    for part in ("line 1", "schema 3", "update holdfast", "line 2", "unknown field 'colour'", "line 3", "line 4"):
        assert part in str(told.value)


def test_a_torn_last_line_is_reported_skipped_and_set_aside(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(entry())
    with ledger.path.open("a") as file:
        file.write('{"schema": 1, "experim')
    with pytest.raises(LedgerError, match="unfinished line of 22 bytes"):
        Ledger(ledger.path, torn="refuse")
    with pytest.warns(TornLine, match="unfinished line of 22 bytes"):
        again = Ledger(ledger.path)
    with pytest.warns(TornLine):
        assert again.entries() == [entry(time=again.entries()[0].time)]
    with pytest.warns(TornLine):
        again.append(entry(seed=1))
    assert [one.seed for one in again.entries()] == [0, 1]
    assert (tmp_path / "ledger.jsonl.torn").read_text() == '{"schema": 1, "experim\n'


def test_a_disk_that_fills_up_leaves_no_half_line(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(entry())
    write = os.write
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda file, line: write(file, line[:40]))
        with pytest.raises(OSError, match="no room"):
            ledger.append(entry(seed=1))
    assert [one.seed for one in ledger.entries()] == [0]


WRITER = """
import sys
from holdfast.drift.ledger import Entry, Ledger, Score
path, seed = sys.argv[1], int(sys.argv[2])
ledger, items = Ledger(path), tuple(0.123456789 for _ in range(10_000))
entry = Entry("demo", "plain LoRA", {}, seed, "test", {"skills": Score(0.1, items=items)}, environment={})
line = entry.to_json()
Entry.to_json = lambda entry: line  # so that nearly all the time goes into writing
print("ready", flush=True)
sys.stdin.readline()
while True:
    ledger.append(entry)
"""


@pytest.mark.filterwarnings("ignore::holdfast.drift.ledger.TornLine")
def test_killed_writers_leave_only_whole_lines(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.touch()
    for round in range(1, 4):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, path, str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for seed in range(3)
        ]
        for writer in writers:
            assert writer.stdout.readline() == b"ready\n"
        for writer in writers:
            writer.stdin.write(b"go\n")
            writer.stdin.flush()
        while path.stat().st_size < round * 2_500_000:
            time.sleep(0.001)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
    ledger = Ledger(path)
    ledger.append(entry(seed=9))
    *found, last = ledger.entries()
    assert last.seed == 9
    assert {one.seed for one in found} <= {0, 1, 2}
    assert len(found) > 40
    assert all(len(one.scores["skills"].items) == 10_000 for one in found)


def test_the_environment_names_no_host_and_no_person():
    told = json.dumps(environment()).lower()
    assert environment()["python"] == sys.version.split()[0]
    private = {os.uname().nodename, os.environ.get("USER", ""), os.environ.get("HOME", "")} - {"", "root", "/"}
    assert not [name for name in private if name.lower() in told]


def test_the_ledger_needs_the_standard_library_alone():
    code = "import sys, holdfast.drift.ledger; print({'torch', 'numpy', 'scipy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_lines_of_the_first_schema_are_read_as_they_are(tmp_path):
    """Ledgers that were written before scores said what measured them."""
    record = json.loads(entry().to_json())
    for name in ("models", "command", "not_measured"):
        del record[name]
    path = tmp_path / "ledger.jsonl"
    path.write_text(json.dumps(record | {"schema": 1}) + "\n")
    (read,) = Ledger(path).entries()
    assert read.scores == entry().scores
    assert (read.models, read.command, read.not_measured) == ({}, "", {})


def test_what_measured_a_score_and_who_answered_come_back_as_they_were():
    score = Score(0.5, items=(0, 1), categories=("a", "b"), instrument="scorer 1 on core 2", interval=(0.1, 0.9))
    one = Entry(
        "drift", "mine", {}, 0, "test", {"refusal": score}, models={"base": {"sha256": "abc"}},
        command="holdfast drift x", not_measured={"harm": "no judge"},
    )  # fmt: skip
    assert Entry.from_json(one.to_json()) == one


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"categories": ("a",)}, "1 categories for 2 items"),
        ({"interval": (0.1, math.nan)}, "an end of the interval is nan"),
        ({"interval": (0.1, "wide")}, "an end of the interval is 'wide'"),
    ],
)
def test_categories_and_intervals_that_do_not_fit_are_refused(changes, fault):
    with pytest.raises(LedgerError, match=fault):
        Entry("drift", "mine", {}, 0, "test", {"refusal": Score(0.5, items=(0, 1), **changes)})


def test_the_items_of_two_instruments_are_no_pair():
    from holdfast.analysis.changes import change

    one, two = (Score(0.5, items=(0, 1), instrument=name) for name in ("scorer 1", "scorer 2"))
    with pytest.raises(ValueError, match="scorer 2"):
        change(one, two)
