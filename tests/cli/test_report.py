"""`holdfast report` on small ledgers and on one of the real ones in docs/results."""

import re
from pathlib import Path

import pytest
from holdfast.analysis.ledger_page import PageError
from holdfast.cli import app
from holdfast.drift.ledger import Entry, Score
from typer.testing import CliRunner

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def called(*arguments):
    result = CliRunner().invoke(app, ["report", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.output


def ledger(path, values, **settings):
    """A ledger of arms with one score each, over two seeds; `values` by arm."""
    entries = [
        Entry("tune", arm, settings if arm != "base" else {}, seed, "test", {"skills": Score(value + 0.01 * seed)},
              environment={"commit": "abc123", "processor": "a quick one"}, time="2026-11-21T10:00:00+00:00")
        for arm, value in values.items() for seed in (0, 1)
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(entry.to_json() + "\n" for entry in entries))
    return path


@pytest.fixture
def runs(tmp_path):
    ledger(tmp_path / "runs" / "monday" / "ledger.jsonl", {"base": 0.9, "plain LoRA": 0.5, "TMKL": 0.8}, rate=1e-3)
    ledger(tmp_path / "runs" / "tuesday" / "ledger.jsonl", {"base": 0.9, "plain LoRA": 0.6}, rate=1e-3)
    return tmp_path / "runs"


def test_the_demo_that_is_shipped(tmp_path):
    """Its frontier has the numbers of the page that the demo itself writes."""
    from holdfast.analysis.frontier import at_matched_learning, compare, matched_levels
    from holdfast.drift.ledger import Ledger
    from holdfast.recipe.demo import jobs

    code, told = called(RESULTS / "demo", "--output", tmp_path / "page.html", "--still", "--keep", "skills")
    assert code == 0
    counted = f"{len(jobs(3))} runs of 5 arms in 1 experiment, from 1 ledger, with 3 seeds; none failed."
    assert counted in told
    assert "demo: Against plain LoRA at equal learning, " in told
    entries = Ledger(RESULTS / "demo" / "ledger.jsonl").entries("demo", status=None)
    readings = at_matched_learning(entries, retention=["skills"], levels=matched_levels(entries, "plain LoRA"))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for found in compare(readings, "plain LoRA"):
        assert found.numbers in page
    assert "plotly.js v" not in page
    assert len(page) < 1_500_000


def test_real_drift_and_its_verdicts(tmp_path):
    code, told = called(RESULTS / "drift" / "ledger.jsonl", "--output", tmp_path / "page.html", "--still")
    assert code == 0
    assert re.search(r"lab, harsh: tuned, seed 0[^:]*: \d+ of \d+ scores drifted beyond noise, all for the worse", told)
    assert "lab, B = 0: tuned: Identical to the base on every item" in told
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "holdfast drift lab-aligned --adapter" in page


def test_what_is_not_known_is_said_and_how_to_say_it(runs, tmp_path):
    code, told = called(runs, "--output", tmp_path / "page.html", "--title", "All of it")
    assert code == 0
    assert "5 runs" not in told  # of two seeds each: three arms' worth in two ledgers
    assert "6 runs of 2 arms in 2 experiments, from 2 ledgers, with 2 seeds; none failed." in told
    assert "Measured 2026-11-21, at commit abc123." in told
    assert "On one kind of machine: a quick one." in told
    assert "no frontier" not in told
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<title>All of it</title>" in page
    assert "<dt>tune · monday</dt><dd>measured on test only: a frontier is chosen on validation" in page
    assert "0.51" in page  # the mean of 0.50 and 0.51, to two digits


def test_an_unknown_score_is_asked_for(tmp_path):
    """Two splits and no score that is known to be learned: the page is there, and says what to type; then it has it."""
    entries = [
        Entry("tune", arm, {"scale": scale}, seed, split,
              {"task_loss": Score(learned), "text_loss": Score(kept + 0.01 * seed)}, environment={})
        for arm, runs in (("base", [(0, 3.0, 1.0)]), ("plain LoRA", [(0.5, 2.0, 1.5), (1, 1.0, 2.0)]),
                          ("TMKL", [(0.5, 2.0, 1.1), (1, 1.0, 1.2)]))
        for scale, learned, kept in runs for seed in range(3) for split in ("validation", "test")
    ]  # fmt: skip
    path, page = tmp_path / "ledger.jsonl", tmp_path / "page.html"
    path.write_text("".join(entry.to_json() + "\n" for entry in entries))
    code, told = called(path, "--output", page, "--still")
    assert code == 0
    assert "which score is learned is not known: name it with --learn. There are task_loss, text_loss" in told
    code, told = called(path, "--output", page, "--still", "--learn", "task_loss", "--keep", "text_loss")
    assert code == 0
    assert "Against plain LoRA at equal learning, better in some score and worse in none: TMKL. 3 of 3 " in told
    assert "<b>1.110</b>" in page.read_text(encoding="utf-8")  # of TMKL, mean over seeds where half is learned


def test_two_ledgers_side_by_side(runs, tmp_path):
    code, _ = called("--compare", runs / "monday", runs / "tuesday", "--output", tmp_path / "page.html", "--still")
    assert code == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for part in ("tune: plain LoRA", "at the same settings and seed", "+0.10", "monday has TMKL", "= identical"):
        assert part in page, part


def test_two_arms_side_by_side(runs, tmp_path):
    page = tmp_path / "page.html"
    code, _ = called(runs / "monday", "--compare", "plain LoRA", "TMKL", "--output", page, "--still")
    assert code == 0
    assert re.search(r'data-score="skills".*\+0\.30.*▲ better', page.read_text(encoding="utf-8"))


def test_faults_of_options_at_once_and_no_page(runs, tmp_path):
    page = tmp_path / "page.html"
    with pytest.raises(PageError) as told:
        called(runs, "--learn", "gsm8k", "--keep", "skills=up", "--baseline", "nobody", "--compare", "TMKL", "plane",
               "--output", page)  # fmt: skip
    assert len(told.value.faults) == 4
    for part in ("there are skills", "skills=lower or skills=higher", "there are plain LoRA, TMKL", "The arms: plain"):
        assert part in str(told.value), part
    assert not page.exists()
    with pytest.raises(PageError, match="no ledger was named"):
        called()


def test_the_error_is_a_message_and_not_a_traceback(tmp_path, capsys, monkeypatch):
    from holdfast.cli import main

    monkeypatch.setattr("sys.argv", ["holdfast", "report", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    told = capsys.readouterr().err
    assert "there is no file or folder" in told
    assert "Traceback" not in told
