"""`holdfast fit` on a ledger whose law is known."""

import json

import numpy as np
import pytest
from holdfast.cli import app
from holdfast.core.errors import ConfigError
from holdfast.drift.ledger import Entry, Score
from typer.testing import CliRunner

PLAIN, KEPT = 0.01, 0.004


def called(*arguments):
    result = CliRunner().invoke(app, ["fit", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    """Two arms over two and a half decades of steps, two ranks and two seeds; forgetting rises with rank."""
    path, random = tmp_path_factory.mktemp("fit") / "ledger.jsonl", np.random.default_rng(0)
    entries = [Entry("shift", "base", {}, 0, "test", {"text_nll": Score(2.0)}, environment={})]
    for arm, amplitude in (("plain LoRA", PLAIN), ("TMKL", KEPT)):
        for steps in (30, 100, 300, 1000, 3000, 10_000):
            for rank in (4, 16):
                for seed in (0, 1):
                    loss = (2 + amplitude * steps**0.5 * rank**0.2) * np.exp(0.003 * random.standard_normal())
                    settings = {"steps": steps, "rank": rank, "learning_rate": 1e-3}
                    entries.append(
                        Entry("shift", arm, settings, seed, "test", {"text_nll": Score(loss)}, environment={})
                    )
    path.write_text("".join(entry.to_json() + "\n" for entry in entries))
    return path


ASKED = ("--score", "text_nll", "--data", "steps", "--size", "rank", "--law", "base", "--draws", 40)


def test_a_table_predictions_and_a_figure(ledger, tmp_path):
    code, told = called(ledger, *ASKED, "--predict", 10, "--figure", tmp_path / "fit.png")
    assert code == 0
    for part in ("plain LoRA", "TMKL", "A·D^β/N^α", "95 %", "last seen", "α rests on two sizes", "10x the data"):
        assert part in told
    assert told.count("expect forgetting") == 4  # two arms, two ranks
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")


def test_json_holds_what_was_planted(ledger):
    code, told = called(ledger, *ASKED, "--predict", 10, "--arm", "plain LoRA", "--json")
    assert code == 0
    found = json.loads(told)
    assert list(found) == ["plain LoRA"]
    one = found["plain LoRA"]
    for name, value in {"A": PLAIN, "α": -0.2, "β": 0.5}.items():
        low, high = one["intervals"][name]
        assert low < one["parameters"][name] < high
        assert one["parameters"][name] == pytest.approx(value, rel=0.1)
    expected = {place["size"]: place["forgetting"] for place in one["expected"]["10.0"]}
    assert expected == pytest.approx({rank: PLAIN * 1e5**0.5 * rank**0.2 for rank in (4, 16)}, rel=0.05)
    assert one["base"] == 2.0
    assert {each["law"] for each in one["held_out"]} == {"base", "drift", "injected", "shifted", "last seen"}
    assert next(each for each in one["held_out"] if each["law"] == "injected")["error"] is None


def test_what_cannot_be_told_is_said(ledger):
    code, told = called(ledger, *ASKED[:4], "--arm", "TMKL", "--where", "rank=4", "--draws", 20)
    assert code == 0
    assert "not told" in told
    assert "α cannot be known" in told


def test_faults_of_all_arms_at_once(ledger):
    with pytest.raises(ValueError, match="cannot go on") as told:
        called(ledger, "--score", "nll", "--data", "tokens", "--arm", "TMKL", "--arm", "nope")
    for part in ("TMKL: field 'tokens' is missing", "TMKL: score 'nll' is missing", "nope: no finished entry"):
        assert part in str(told.value)


def test_faults_of_options_at_once(ledger):
    with pytest.raises(ConfigError) as told:
        called(ledger, *ASKED[:4], "--law", "cubic", "--predict", -1, "--where", "colour=red")
    assert len(told.value.faults) == 3
    with pytest.raises(ConfigError, match="there is no ledger"):
        called("nowhere.jsonl", *ASKED)
    with pytest.raises(ConfigError, match="holds shift"):
        called(ledger, *ASKED, "--experiment", "other")
