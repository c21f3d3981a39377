"""Matched learning: hand-computed cases, what is chosen where, and how often copies of one arm are told apart."""

import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from holdfast.analysis.frontier import (
    Comparison,
    arms,
    at_matched_learning,
    compare,
    front,
    matched_levels,
    pareto,
    points,
    settings_tried,
)
from holdfast.analysis.scores import ScoreKind
from holdfast.analysis.uncertainty import interval, resample
from holdfast.drift.ledger import Entry, Score


def both(arm, adaptation, skills, seed=0, test=None, **settings):
    """The two entries of one setting; `test` gives other values there."""
    values = {"validation": (adaptation, skills), "test": test or (adaptation, skills)}
    return [
        Entry("demo", arm, settings, seed, split, {"adaptation": Score(a), "skills": Score(s)}, environment={})
        for split, (a, s) in values.items()
    ]


BASE = both("base", 0.0, 1.0)


def means(entries, levels, **how):
    return [reading.mean for reading in at_matched_learning(entries, levels=levels, **how)]


def test_retention_is_interpolated_between_neighbours_of_the_front():
    sweep = both("plain", 0.4, 0.9, scale=0.5) + both("plain", 0.8, 0.5, scale=1.0)
    assert means(BASE + sweep, [0.0, 0.2, 0.4, 0.5, 0.7, 0.8]) == pytest.approx([1.0, 0.95, 0.9, 0.8, 0.6, 0.5])


def test_nothing_is_extrapolated():
    sweep = both("plain", 0.4, 0.9, scale=0.5) + both("plain", 0.8, 0.5, scale=1.0)
    below, inside, above = at_matched_learning(sweep, levels=[0.3, 0.6, 0.81])
    assert (below.values, above.values) == ({}, {})
    assert inside.values == pytest.approx({0: 0.7})
    assert math.isnan(above.mean)
    assert (inside.reached, above.reached) == ("1 of 1", "0 of 1")
    assert inside.gap == pytest.approx(0.4)


def test_beaten_points_are_passed_over_and_the_base_is_not():
    sweep = both("plain", 0.4, 0.6, strength=1) + both("plain", 0.5, 0.8, strength=2)
    beaten = both("plain", 0.2, 1.1, strength=3)  # keeps more than the base itself
    assert means(BASE + sweep, [0.4]) == pytest.approx([1 - 0.4 / 0.5 * 0.2])
    assert means(BASE + sweep + beaten, [0.1]) == pytest.approx([1.05])


def test_points_of_equal_adaptation_count_as_their_mean():
    sweep = both("plain", 0.7, 0.5, test=(0.8, 0.5), strength=1) + both("plain", 0.8, 0.4, test=(0.8, 0.3), strength=2)
    assert means(BASE + sweep, [0.4, 0.8]) == pytest.approx([0.7, 0.4])


def test_settings_are_chosen_on_validation_and_reported_on_test():
    lucky = both("plain", 0.8, 0.9, test=(0.8, 0.4), strength=1)  # looks best where one may look
    solid = both("plain", 0.8, 0.6, test=(0.8, 0.6), strength=2)  # is best where one may not
    entries = BASE + lucky + solid
    assert [
        point.settings["strength"] for point in front(points(entries), "plain", 0, ["adaptation", "skills"])[1:]
    ] == [1]
    assert means(entries, [0.8]) == pytest.approx([0.4])
    assert means(entries, [0.8], chosen_on="test") == pytest.approx([0.6])


def test_lower_is_better_turns_the_front_over():
    kinds = {"adaptation": ScoreKind("Loss", False), "skills": ScoreKind("Perplexity", False)}
    entries = both("base", 4.0, 8.0) + both("plain", 2.0, 12.0, strength=1) + both("plain", 1.0, 10.0, strength=2)
    assert means(entries, [2.5], kinds=kinds) == pytest.approx([9.0])  # the point at 2.0 is beaten
    assert math.isnan(means(entries, [4.1], kinds=kinds)[0])
    assert matched_levels(entries, "plain", fractions=[0.5], kinds=kinds) == (2.5,)
    assert at_matched_learning(entries, levels=[2.5], kinds=kinds)[0].place == "Loss 2.50"


def test_readings_do_not_depend_on_which_run_ended_first(demo):
    """Runs end in any order: the seeds of a reading, which copies are made of, have one."""
    random = np.random.default_rng(0)
    first = [entry for entry in demo if entry.arm == "base"]
    told = set()
    for _ in range(3):
        rest = [demo[place] for place in random.permutation(len(demo)) if demo[place].arm != "base"]
        readings = at_matched_learning(first + rest, levels=[0.5, 0.7], draws=20)
        assert {(reading.seeds, tuple(reading.samples)) for reading in readings} == {((0, 1, 2), (0, 1, 2))}
        told.add(tuple(sorted((r.arm, r.level, r.mean, *r.samples[2]) for r in readings)))
    assert len(told) == 1


def test_one_front_can_decide_for_all_scores():
    def scored(strength, adaptation, skills, rare):
        scores = {"adaptation": Score(adaptation), "skills": Score(skills), "rare": Score(rare)}
        settings = {"strength": strength}
        return [Entry("demo", "plain", settings, 0, split, scores, environment={}) for split in ("validation", "test")]

    entries = scored(1, 0.8, 0.9, 0.2) + scored(2, 0.8, 0.5, 0.7)
    assert means(entries, [0.8], retention=["rare"]) == pytest.approx([0.7])
    assert means(entries, [0.8], retention=["rare"], along="skills") == pytest.approx([0.2])


def test_scaled_points_can_be_left_out_and_settings_are_counted():
    entries = BASE + both("plain", 0.4, 0.9, scale=0.5, strength=1) + both("plain", 0.8, 0.5, scale=1.0, strength=1)
    entries += both("plain", 0.7, 0.5, scale=1.0, strength=2)
    entries += [Entry("demo", "plain", {"strength": 3}, 0, "test", {}, status="failed", error="NaN", environment={})]
    assert means(entries, [0.4]) == pytest.approx([0.9])
    assert means(entries, [0.4], scaled=False) == pytest.approx([0.75])
    assert settings_tried(entries)["plain"] == (3, 4)
    assert arms(entries) == ["plain"]


def test_what_is_incomplete_is_said_and_what_is_repeated_counts_once():
    entries = both("plain", 0.8, 0.5, strength=1) + both("plain", 0.9, 0.4, strength=2)[:1]
    with pytest.warns(UserWarning, match="1 of 2 settings are left out"):
        assert len(points(entries)) == 1
    again = both("plain", 0.8, 0.7, strength=1)
    assert [point.reported["skills"].value for point in points(entries[:2] + again)] == [0.7]
    with pytest.raises(ValueError, match="One experiment at a time"):
        points([*entries[:2], replace(entries[0], experiment="another")])
    with pytest.raises(ValueError, match="Did you mean 'skills'"):
        pareto(points(again), ["adaptation", "skils"])


def test_differences_are_paired_by_seed_and_the_interval_is_students():
    gains, entries = [0.10, 0.12, 0.14], list(BASE)
    for seed, gain in enumerate(gains):
        luck = 0.3 * seed  # large, and common to both arms
        entries += both("plain", 1.0, 0.2 + luck, seed) + both("TMKL", 1.0, 0.2 + luck + gain, seed)
    (found,) = compare(at_matched_learning(entries, levels=[1.0]), "plain")
    half = 4.302653 * 0.02 / math.sqrt(3)
    assert (found.difference, found.low, found.high) == pytest.approx((0.12, 0.12 - half, 0.12 + half))
    assert found.verdict == "better"
    assert found.sentence() == (
        "Old skills kept at New task learned 1.00: TMKL is better, 0.62 against 0.50 for plain; +0.12 [+0.07, +0.17], "
        "3 seeds."
    )


def test_a_loss_over_decades_is_compared_by_ratio():
    """A third of the rival's loss in every seed: as a difference the largest seed decides, and nothing can be told."""
    losses = {0: 0.03, 1: 0.3, 2: 3.0}
    entries = [*BASE]
    for seed, loss in losses.items():
        entries += both("plain", 0.5, loss, seed) + both("mine", 0.5, loss / 3, seed)
    found = {}
    for ratio in (False, True):
        kinds = {"skills": ScoreKind("Skills loss", False, ".3f", ratio=ratio)}
        readings = at_matched_learning(entries, retention=("skills",), levels=(0.5,), kinds=kinds)
        [found[ratio]] = compare(readings, "plain", kinds=kinds)
    assert found[False].verdict == "within noise"
    assert found[True].verdict == "better"
    assert found[True].difference == pytest.approx(math.log(1 / 3))
    assert found[True].numbers == "×0.33 [×0.33, ×0.33]"
    one = replace(found[True], difference=0.001, low=0.0005, high=0.002)
    assert one.verdict == "within noise"  # it prints as ×1


def test_only_seeds_that_both_reach_are_compared():
    entries = BASE + both("plain", 1.0, 0.5, 0) + both("plain", 1.0, 0.3, 1) + both("plain", 0.6, 0.9, 2)
    entries += both("TMKL", 1.0, 0.8, 0) + both("TMKL", 0.5, 0.8, 1) + both("TMKL", 1.0, 0.8, 2)
    middle, high = compare(at_matched_learning(entries, levels=[0.9, 1.1]), "plain")
    assert middle.seeds == (0,)
    assert middle.arm.reached == "2 of 3"
    assert middle.verdict == "within noise"  # one seed shows no spread
    assert math.isinf(middle.high)
    assert high.verdict == "not reached"
    assert "TMKL reaches it in 0 of 3 seeds" in high.sentence()
    with pytest.raises(ValueError, match="No arm 'plane'"):
        compare(at_matched_learning(entries), "plane")


def test_items_widen_the_interval_even_when_seeds_agree():
    exact = np.full((3, 201), 0.1)
    assert interval(exact)[1:] == pytest.approx((0.1, 0.1))
    noisy = exact + np.concatenate([[0.0], np.random.default_rng(0).normal(0, 0.1, 200)])
    assert interval(noisy)[2] - 0.1 == pytest.approx(1.96 * 0.1, rel=0.15)


def test_items_are_resampled_alike_for_all_who_were_measured_on_them():
    items = tuple(np.random.default_rng(0).integers(0, 2, 100).astype(float))
    mine = resample(Score(float(np.mean(items)), items=items), "skills", "a", 300)
    theirs = resample(Score(float(np.mean(items)), items=items), "skills", "b", 300)
    assert np.array_equal(mine, theirs)
    assert mine[1:].std() == pytest.approx(np.std(items) / 10, rel=0.15)
    perplexity = resample(Score(float(np.exp(np.mean(items))), items=items), "story_perplexity", "a", 300)
    assert perplexity[1:].std() == pytest.approx(np.exp(np.mean(items)) * np.std(items) / 10, rel=0.2)
    certain = resample(Score(1.0, n=40), "refusal", "a", 300, share=True)
    assert 0.02 < certain[1:].std() < 0.05  # 40 of 40 is not a certainty


def test_levels_are_parts_of_what_the_baseline_learns_on_validation():
    entries = both("base", 0.1, 1.0) + both("plain", 0.9, 0.5, test=(0.2, 0.5)) + both("TMKL", 0.3, 0.9)
    assert matched_levels(entries, "plain") == (0.5, 0.7, 0.82)


@pytest.mark.parametrize(("seeds", "experiments"), [(3, 400), (2, 200)])
def test_two_copies_of_one_arm_are_within_noise(simulate, seeds, experiments):
    """At most 5 % of readings may tell apart what is the same; docs/frontier.md has the rates."""
    verdicts = Counter()
    for number in range(experiments):
        random = np.random.default_rng([seeds, number])
        same = {"one": 0.4, "the same": 0.4}
        entries = simulate(random, same, range(seeds), strengths=(1.0,), scales=(0.5, 0.75, 1.0), items=20)
        readings = at_matched_learning(entries, retention=["skills", "story_perplexity"], levels=[0.7], draws=50)
        verdicts.update(found.verdict for found in compare(readings, "one"))
    judged = verdicts["better"] + verdicts["worse"] + verdicts["within noise"]
    assert judged > 1.8 * experiments
    assert verdicts["within noise"] / judged >= 0.95


def test_more_settings_win_nothing_unless_chosen_on_test(simulate):
    """Two identical arms, one with six settings to choose from: why what is tuned on is not what is reported on."""
    gains = {"validation": [], "test": []}
    for number in range(40):
        strengths = [1 + step / 1000 for step in range(6)]
        arms = {"one setting": 0.4, "six settings": 0.4}
        drawn = simulate(np.random.default_rng(number), arms, range(2), strengths, scales=(0.5, 1.0), items=30)
        entries = [entry for entry in drawn if entry.arm != "one setting" or entry.settings["strength"] == 1]
        for split, found in gains.items():
            readings = at_matched_learning(entries, levels=[0.5], chosen_on=split, draws=0)
            found += [one.difference for one in compare(readings, "one setting") if one.seeds]
    error = np.std(gains["validation"]) / math.sqrt(len(gains["validation"]))
    assert abs(np.mean(gains["validation"])) < 3 * error
    assert np.mean(gains["test"]) > 3 * error


def test_a_large_true_difference_is_found(simulate):
    verdicts = Counter()
    for number in range(20):
        entries = simulate(np.random.default_rng(number), {"plain": 0.6, "kept": 0.05}, range(3), items=100)
        verdicts.update(f.verdict for f in compare(at_matched_learning(entries, levels=[0.8]), "plain"))
    assert verdicts["better"] >= 15
    assert verdicts["worse"] == 0


def test_analysis_does_not_import_torch():
    code = "import sys, holdfast.analysis.report, holdfast.analysis.tables; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "False\n"


def test_a_difference_that_prints_as_nothing_is_no_difference():
    """An interval of -0.00001 to -0.00002 does not cover 0, and says nothing to a reader of three digits."""
    reading = at_matched_learning([*both("a", 0.5, 0.5), *both("b", 0.5, 0.5)], levels=(0.5,))[0]
    kind = ScoreKind("Loss", False, ".3f")
    for difference, verdict in ((-1e-5, "within noise"), (-1e-2, "better"), (1e-2, "worse")):
        made = Comparison(reading, reading, kind, (0, 1), difference, difference * 1.5, difference * 0.5)
        assert made.verdict == verdict
