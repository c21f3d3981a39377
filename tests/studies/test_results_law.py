"""The page on the law of forgetting tells a method that is flatter from one that only learns more slowly."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from holdfast.analysis.fit import LAWS
from holdfast.analysis.fit_pairs import Difference
from holdfast.drift.ledger import Entry, Ledger, Score

from studies.results.comparisons import PLAIN, RESULTS
from studies.results.law_page import NAME, SCORES, sheet
from studies.results.law_words import head
from studies.results.runs import lean, write

STEPS, RANKS, SEEDS = (3, 12, 30, 95, 300), (2, 8, 32), (0, 1, 2)
FLATTER, SLOWER, ALIKE = "flatter", "slower", "alike"
BASE = {"new_task_loss": 3.5, "stories_loss": 0.8, "skills_loss": 0.05, "refusals_loss": 0.02}
FORGETS = {"stories_loss": 0.05, "skills_loss": 0.03, "refusals_loss": 0.02}  # A of plain LoRA


def losses(arm: str, steps: int, rank: int, noise: float) -> dict[str, float]:
    """What is planted: *slower* is plain LoRA at a quarter of the steps; *flatter* has half of A, and learns alike."""
    steps = steps / 4 if arm == SLOWER else steps
    share = 0.5 if arm == FLATTER else 1.0
    kept = {s: BASE[s] + share * a * steps**0.5 * rank**0.1 * math.exp(noise) for s, a in FORGETS.items()}
    return {"new_task_loss": 3.5 * math.exp(-0.4 * steps**0.5), **kept}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder with a ledger as `publish` leaves it."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("results")
    entries = [entry("base", {}, 0, split, BASE) for split in ("validation", "test")]
    for seed in SEEDS:
        for arm in (PLAIN, SLOWER, FLATTER, ALIKE):
            for rank in RANKS:
                run = 0.02 * random.standard_normal()
                for steps in STEPS:
                    noise = run + 0.02 * random.standard_normal()
                    early = {} if steps == STEPS[-1] else {"checkpoint": steps}
                    for split in ("validation", "test"):
                        settings = {"lora.r": rank, "scale": 1.0, **early}
                        scores = losses(arm, steps, rank, noise)
                        entries.append(entry(arm, settings, seed, split, scores, steps=float(steps)))
    write(lean(entries, NAME), folder / NAME / "ledger.jsonl")
    return folder


def entry(arm, settings, seed, split, scores, **cost) -> Entry:
    scored = {name: Score(value, n=24) for name, value in scores.items()}
    return Entry(NAME, arm, settings, seed, split, scored, cost=cost, environment={})


@pytest.fixture(scope="module")
def page(results) -> str:
    made = sheet(results, draws=40, forms=[LAWS["base"], LAWS["drift"]])
    assert made is not None
    return made.text()


def line(page: str, start: str) -> str:
    return next(each for each in page.splitlines() if each.startswith(start))


def test_what_is_flatter_is_told_from_what_only_learns_slowly(page):
    assert line(page, "- **flatter:").startswith("- **flatter: flatter: less forgotten at equal data, and at equal")
    assert line(page, "- **slower:").startswith("- **slower: only slower")
    assert "not flatter at equal data (no difference beyond noise)" in line(page, "- **alike:")


def test_a_lower_law_is_shown_with_what_was_learned_less(page):
    """In the middle, D = 30, N = 8: planted forgetting of stories, and the task loss after 30 steps."""
    plain, slower = (0.05 * steps**0.5 * 8**0.1 for steps in (30, 7.5))
    told = line(page, "- **slower:")
    assert f"task loss there {3.5 * math.exp(-0.4 * 7.5**0.5):.3f} against {3.5 * math.exp(-0.4 * 30**0.5):.3f}" in told
    difference = float(told.split("story loss ✓ ")[1].split(" [")[0])
    assert difference == pytest.approx(slower - plain, abs=0.03)


def test_parameters_that_were_planted_are_in_the_tables(page):
    table = page.split("### The law of story loss")[1].split("###")[0]
    cells = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in table.splitlines() if row.startswith("| ")}
    for arm, factor in ((PLAIN, 1.0), (FLATTER, 0.5), (SLOWER, 0.5)):  # √(1/4) of the steps
        middle = float(cells[arm][6].split(" ")[0])
        assert middle == pytest.approx(factor * 0.05 * 30**0.5 * 8**0.1, abs=0.03)
    assert float(cells[PLAIN][3].split(" ")[0]) == pytest.approx(0.5, abs=0.1)


def test_every_part_of_the_page_says_something(page, results):
    parts = ["## Verdict", "## The laws", "### A and E", "### Which form foretells", "### Expected at 10 times"]
    parts += ["### What the fits refuse or doubt", "## Result at matched learning", "## Controls", "## Limits"]
    for part in parts:
        assert len(page.split(part)[1].split("\n#")[0]) > 40, part
    assert "Runs instead of seeds.** Drawing whole runs (9 of each arm)" in page
    assert "E is not told from 0" in page
    assert "**Does the law describe the runs?** Not in 0 of 12 laws" in page
    assert "rest on 3 independent groups" in page
    for name in ("law.png", "frontier.png"):
        assert (results / NAME / name).read_bytes().startswith(b"\x89PNG")
        assert f"({NAME}/{name})" in page


def test_one_seed_makes_no_page(results, tmp_path):
    entries = Ledger(results / NAME / "ledger.jsonl").entries()
    write([one for one in entries if one.seed == 0], tmp_path / NAME / "ledger.jsonl")
    assert sheet(tmp_path, figures=False) is None
    assert sheet(tmp_path / "none", figures=False) is None


def test_two_decades_are_needed_for_a_residual(results, tmp_path):
    entries = Ledger(results / NAME / "ledger.jsonl").entries()
    short = [one for one in entries if one.arm == "base" or one.cost["steps"] > 3]
    write(short, tmp_path / NAME / "ledger.jsonl")
    text = sheet(tmp_path, figures=False, draws=20, forms=()).text()
    assert "E and A·D^β look alike" in text
    assert "E is not told" in text
    assert "not told" in text.split("### The law of story loss")[1].split("###")[0]


def test_heads_say_what_the_differences_are():
    less, more, same = Difference(-1, -2, -0.5), Difference(1, 0.5, 2), Difference(0, -1, 1)
    assert head([less, same], "within noise").startswith("only slower, as far as these runs tell")
    assert head([less], "worse").startswith("only slower: less forgotten")
    assert head([less, more], "better").startswith(
        "not flatter at equal data (less of one, more of another), but better"
    )
    assert head([more, same], "worse") == "not flatter at equal data (more forgotten), and worse at equal learning"


@pytest.mark.slow
@pytest.mark.skipif(not (RESULTS / NAME / "ledger.jsonl").is_file(), reason="the comparison has not been run yet")
def test_the_page_is_that_of_the_committed_ledger():
    made = sheet(RESULTS, figures=False)
    assert made is not None
    assert {*SCORES} <= Ledger(RESULTS / NAME / "ledger.jsonl").entries(arm=PLAIN)[0].scores.keys()
    assert made.text() == (RESULTS / f"{NAME}.md").read_text(encoding="utf-8")
