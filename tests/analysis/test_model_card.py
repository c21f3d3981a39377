"""The drift table of a model card: every score, the numbers of the report, and Markdown that nothing breaks out of."""

import re
from dataclasses import replace

import pytest
from holdfast.analysis.budgets import Budget, Gate
from holdfast.analysis.changes import change
from holdfast.analysis.gate import judge
from holdfast.analysis.model_card import drift_table
from holdfast.drift.entry import Entry
from holdfast.drift.score import Score


def rate(hits, n=60, instrument="scorer 1.2"):
    return Score(hits / n, items=(1.0,) * hits + (0.0,) * (n - hits), instrument=instrument)


def entry(arm, **scores):
    return Entry("demo", arm, {}, 0, "test", scores, command="holdfast drift --suite core")


@pytest.fixture
def base():
    return entry("base", refusal=rate(60), over_refusal=rate(6), vibes=Score(3.0, n=50, standard_error=0.1))


@pytest.fixture
def tuned():
    return entry("TMKL", refusal=rate(40), over_refusal=rate(6), vibes=Score(4.0, n=50, standard_error=0.1))


def rows(text):
    """The cells of the table's rows; an escaped bar does not part them."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_every_score_with_its_numbers(base, tuned):
    text = drift_table(base, tuned)
    assert text.startswith("## Drift from the base\n\n2 of 3 scores drifted beyond noise: 1 for the worse, 1 in a")
    head, _, refusal, over, vibes = rows(text)
    assert head == ["Score", "Base", "Tuned", "Drift [95 % interval]", "n", "Instrument"]
    low, high = (f"{100 * end:.1f}".replace("-", "−") for end in change(rate(60), rate(40)).interval())
    assert refusal == [
        "Harmful requests refused (`refusal`)", "100.0 %", "66.7 %", f"−33.3 points [{low}, {high}], worse", "60",
        "scorer 1.2",
    ]  # fmt: skip
    assert over[3] == "0.0 points no item changed, identical"
    assert vibes[0] == "vibes"
    assert vibes[3].endswith("drifted (direction not known)")
    assert vibes[5] == "–"


def test_a_second_instrument_is_in_the_table_and_not_in_the_count(base, tuned):
    both = (
        replace(one, scores={**one.scores, "refusal.phrases": rate(hits)}) for one, hits in ((base, 60), (tuned, 40))
    )
    text = drift_table(*both)
    assert "\n\n2 of 3 scores drifted beyond noise" in text
    titles = [row[0] for row in rows(text)]
    assert titles[2] == "Harmful requests refused (`refusal`)"
    assert titles[-1] == "Harmful requests refused (phrases) (`refusal.phrases`, second instrument)"


def test_command_caveat_gate_and_what_was_left_out(base, tuned):
    text = drift_table(base, replace(tuned, not_measured={"lm_eval": "not installed"}))
    assert "```sh\nholdfast drift --suite core\n```" in text
    assert text.count("within noise” means not shown to have drifted") == 1
    assert "Not measured: lm\\_eval (not installed)." in text
    assert "The gate" not in text
    found = judge(Gate((Budget("refusal", "fall", 0.02),)), base.scores, tuned.scores)
    assert "The gate failed: 1 of 1 budget exceeded. 2 of 3 scores" in drift_table(base, tuned, found)
    assert "was not recorded" in drift_table(replace(base, command=""), replace(tuned, command=""))
    assert "Not measured" not in drift_table(base, tuned)


def test_what_cannot_be_compared_is_in_the_table(base, tuned):
    other = replace(tuned, scores={"refusal": rate(40, instrument="scorer 2"), "over_refusal": rate(6)})
    cells = {row[0]: row[3] for row in rows(drift_table(base, other))}
    assert cells["vibes"] == "not compared: measured on the base only"
    assert "scorer 2" in cells["refusal"]


def test_nothing_breaks_out_of_its_cell(base, tuned):
    evil = "a|b\n## c <script> `d` *e* [f](http://g) ``"
    base, tuned = (replace(one, scores={evil: rate(n, instrument=evil)}, command=f"echo ```\n{evil}",
                           not_measured={evil: evil}) for one, n in ((base, 60), (tuned, 40)))  # fmt: skip
    text = drift_table(base, tuned)
    assert {len(row) for row in rows(text.split("Intervals are")[0])} == {6}
    table, command = text.split("Measured with:")
    assert "<script>" not in table
    assert "\n## c" not in table
    assert "](http" not in table.replace("\\](", "")
    assert command.startswith("\n\n````sh\n")
    assert command.endswith("\n````\n")
