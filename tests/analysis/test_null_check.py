"""Two copies of one arm: they tie as often as they ought to, and the check fails where intervals are too narrow."""

import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from holdfast.analysis.frontier import Reading, at_matched_learning, compare
from holdfast.analysis.null_check import NoCopies, _weights, null_check
from holdfast.analysis.report import write_report
from holdfast.analysis.scores import ScoreKind

SCORES = ["skills", "story_perplexity"]


def readings(simulate, number, seeds, draws=50, levels=(0.5, 0.7)):
    entries = simulate(np.random.default_rng([7, number]), {"plain": 0.4}, range(seeds), strengths=(1.0,), items=40)
    return at_matched_learning(entries, retention=SCORES, levels=levels, draws=draws)


def made(values, levels=(0.5,), draws=0, score="skills"):
    """Readings with these values by seed, without luck of items."""
    return [
        Reading("plain", score, level, {s: np.full(1 + draws, v) for s, v in enumerate(values)},
                tuple(range(len(values))), 0.1, (1, 1))
        for level in levels
    ]  # fmt: skip


def test_halves_of_the_seeds_are_compared_as_two_arms_would_be(simulate):
    """All 24 ways to deal and pair four seeds, as entries under other names, against the check's random ones."""
    entries = simulate(np.random.default_rng(3), {"plain": 0.4}, range(4), strengths=(1.0,), items=40)
    how = {"retention": SCORES, "levels": (0.5, 0.7), "draws": 0}
    ties = []
    for order in permutations(range(4)):
        dealt = [
            entry if entry.arm == "base" else replace(
                entry, arm="one" if order.index(entry.seed) < 2 else "two", seed=order.index(entry.seed) % 2, run=""
            )
            for entry in entries
        ]  # fmt: skip
        found = compare(at_matched_learning(dealt, **how), "one", confidence=0.5)
        ties += [each.verdict == "within noise" for each in found]
    exact = sum(ties) / len(ties)
    assert 0.1 < exact < 0.9
    checked = null_check(at_matched_learning(entries, **how), "plain", way="halves", confidence=0.5, resamplings=1500)
    assert (checked.seeds, checked.compared, checked.readings) == (4, 2, 4)
    assert checked.share == pytest.approx(exact, abs=3 * math.sqrt(exact * (1 - exact) / 1500))


@pytest.mark.parametrize("confidence", [0.5, 0.95])
@pytest.mark.parametrize("seeds", [3, 5])
def test_of_drawn_copies_students_interval_holds_exactly_what_it_promises(confidence, seeds):
    """Without luck of items the interval is Student's, and drawn seeds are normal: theory gives the share."""
    values = np.random.default_rng(0).normal(0.5, 1.0, seeds)  # far apart, so that no difference prints as 0
    found = null_check(made(values), "plain", way="drawn", confidence=confidence, resamplings=2500)
    assert found.share == pytest.approx(confidence, abs=4 * math.sqrt(confidence * (1 - confidence) / 2500))
    assert found.low < found.share < found.high


def test_drawn_seeds_have_the_mean_and_covariance_of_the_real_ones():
    random = np.random.default_rng(0)
    values = random.normal(0, [1.0, 3.0], (4, 2))
    drawn = np.concatenate([_weights(random, 4, "drawn")["one"] @ values for _ in range(5000)])
    assert drawn.mean(axis=0) == pytest.approx(values.mean(axis=0), abs=0.08)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(values.T), rtol=0.06, atol=0.05)


@pytest.mark.parametrize("seeds", [3, 6])
def test_where_arms_tie_the_check_says_so_and_where_intervals_are_narrow_it_fails(simulate, seeds):
    shares, narrow = [], []
    for number in range(12):
        own = readings(simulate, number, seeds)
        shares.append(null_check(own, "plain", resamplings=100))
        narrow.append(null_check(own, "plain", resamplings=100, confidence=0.5))
    assert {one.way for one in shares} == {"drawn" if seeds == 3 else "halves"}
    assert {one.compared for one in shares} == {3}
    assert np.mean([one.share for one in shares]) >= 0.95
    assert sum(one.holds for one in shares) >= 11
    assert np.mean([one.share for one in narrow]) < 0.85


def test_an_interval_that_is_too_narrow_is_found_out():
    """Halves whose seeds lie in two clusters: pairs that agree by chance look sure of a difference."""
    clusters = [0.2, 0.2001, 0.2002, 0.9, 0.9001, 0.9002]
    found = null_check(made(clusters), "plain", way="halves")
    assert found.high < 0.95
    assert not found.holds
    assert "That is too few" in found.sentence()


def test_losses_over_decades_are_mixed_as_ratios():
    kinds = {"loss": ScoreKind("Loss", False, ".3f", ratio=True)}
    found = null_check(made([0.03, 0.3, 3.0], score="loss"), "plain", kinds=kinds, resamplings=2000)
    assert found.share == pytest.approx(0.95, abs=0.02)


def test_levels_that_some_seeds_miss():
    """Drawn seeds need all of them; halves go on with the seeds that reach it, here with no pair."""
    own = made([0.1, 0.2, 0.3, 0.4], levels=(0.5, 0.7))
    own[1] = replace(own[1], samples={0: own[1].samples[0]})
    assert null_check(own, "plain", way="drawn", resamplings=50).readings == 1
    assert null_check(own, "plain", way="halves", resamplings=50).readings == 1
    with pytest.raises(NoCopies, match="No level is reached by every seed"):
        null_check(own[1:], "plain", way="drawn")
    with pytest.raises(NoCopies, match="No two copies of 'plain' reach the same level"):
        null_check(own[1:], "plain", way="halves")


def test_what_cannot_be_copied_is_said():
    with pytest.raises(NoCopies, match="No arm 'plane' to copy; there are \\['plain'\\]"):
        null_check(made([0.1, 0.2, 0.3]), "plane")
    with pytest.raises(NoCopies, match="take 3 seeds, 'plain' has 2"):
        null_check(made([0.1, 0.2]), "plain")
    with pytest.raises(NoCopies, match="take 4 seeds, 'plain' has 3"):
        null_check(made([0.1, 0.2, 0.3]), "plain", way="halves")
    with pytest.raises(NoCopies, match="by halves or drawn, not 'thirds'"):
        null_check(made([0.1, 0.2, 0.3]), "plain", way="thirds")


def test_the_same_seed_gives_the_same_answer(simulate):
    own = readings(simulate, 0, 3)
    assert null_check(own, "plain", resamplings=50) == null_check(own, "plain", resamplings=50)


def test_the_page_says_how_often_copies_tie(demo, tmp_path):
    page = write_report(demo, tmp_path / "report.html", interactive=False).read_text(encoding="utf-8")
    assert "Two copies of plain LoRA tie in " in page
    few = [entry for entry in demo if entry.seed < 2]
    page = write_report(few, tmp_path / "report.html", interactive=False).read_text(encoding="utf-8")
    assert "Two copies" not in page
