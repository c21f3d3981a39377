"""Planted laws come back; what the points cannot tell is refused; the form that is true foretells best."""

import math
import subprocess
import sys

import numpy as np
import pytest
from holdfast.analysis import fit_pairs
from holdfast.analysis.extrapolation import LAST_SEEN, compare
from holdfast.analysis.fit import LAWS, FitError, Points, fit
from holdfast.analysis.fit_bootstrap import groups, weights, widened
from holdfast.analysis.fit_figure import fit_png
from holdfast.analysis.fit_points import from_ledger
from holdfast.analysis.fit_solver import Problem
from holdfast.drift.ledger import Entry, Score

from scripts.fit_coverage import BASE, PLANTED, coverage, synthetic


def exact(law, seeds=2):
    return synthetic(law, np.random.default_rng(0), noise=0.0, seeds=seeds)


@pytest.mark.parametrize("law", LAWS)
def test_planted_parameters_come_back_from_exact_points(law):
    found = fit(exact(law), LAWS[law], draws=5)
    assert found.parameters == pytest.approx(PLANTED[law], rel=1e-3)
    assert found.residual < 1e-6
    assert found.refused == {}


def test_planted_parameters_without_a_base():
    points = exact("base")
    unknown = Points(points.data, points.loss, points.size, seed=points.seed)
    found = fit(unknown, LAWS["base"], draws=5)
    assert found.parameters == pytest.approx({**PLANTED["base"], "L0": BASE}, rel=1e-3)
    assert any("L0 was fitted" in told for told in found.said)
    drift = fit(unknown, LAWS["drift"], draws=5)
    assert "L0 + E is one number" in drift.refused["E"]
    assert "E" not in drift.parameters


def test_the_slope_is_the_derivative_written_out():
    points, (A, alpha, beta, E) = exact("drift"), (0.02, 0.2, 0.5, 0.1)
    slope = Problem(points, LAWS["drift"], {}).slope(np.array([math.log(A), alpha, beta, E]))
    for row, D, N in zip(slope, points.data, points.size, strict=True):
        power = A * D**beta / N**alpha
        loss = BASE + power + E
        assert row == pytest.approx([-power / loss, power * math.log(N) / loss, -power * math.log(D) / loss, -1 / loss],
                                    rel=1e-5)  # fmt: skip


def test_one_wild_run_moves_little():
    points = synthetic("base", np.random.default_rng(1), noise=0.003)
    loss = points.loss.copy()
    loss[np.argmax(points.data)] *= 2
    wild = Points(points.data, loss, points.size, seed=points.seed, base=BASE)
    calm, found = fit(points, LAWS["base"], draws=5), fit(wild, LAWS["base"], draws=5)
    assert abs(found.parameters["β"] - calm.parameters["β"]) < 0.01
    x = np.stack([np.ones(len(points)), -np.log(points.size), np.log(points.data)], axis=1)
    plain = np.linalg.lstsq(x, np.log(loss - BASE), rcond=None)[0][2] - np.linalg.lstsq(
        x, np.log(np.maximum(points.loss - BASE, 1e-9)), rcond=None)[0][2]  # fmt: skip
    assert abs(plain) > abs(found.parameters["β"] - calm.parameters["β"])


def test_one_size_cannot_tell_alpha():
    points = exact("base")
    found = fit(points.where(points.size == 16), LAWS["base"], draws=5)
    assert "α" not in found.parameters
    assert "α" not in found.intervals
    assert "All points have N = 16: α cannot be known" in found.refused["α"]
    assert found.refused["α"] in found.said
    assert found.parameters["A"] == pytest.approx(0.01 / 16**0.3, rel=1e-3)
    with pytest.raises(FitError, match="nothing is known of N = 64"):
        found.predict(1000, 64)


def test_under_two_decades_E_is_not_told():
    points = exact("drift")
    short = points.where(points.data <= 1e3 * 7)
    assert 1.7 < short.decades < 2
    found = fit(short, LAWS["drift"], draws=5)
    assert "E" not in found.parameters
    assert "E and A·D^β look alike" in found.refused["E"]
    assert "look like a smaller β" in " ".join(fit(short, LAWS["base"], draws=5).said)
    assert "E" in fit(points, LAWS["drift"], draws=5).parameters


def test_all_faults_of_a_fit_at_once():
    points = Points([10.0, 10.0], [2.1, 2.2], base=2.0)
    with pytest.raises(FitError) as told:
        fit(points, LAWS["injected"])
    assert [fault.split(":")[0] for fault in told.value.faults][:3] == [
        "all points have D = 10", "all points have p = 0", "all points have N = 1",
    ]  # fmt: skip
    with pytest.raises(FitError, match="2 points at 2 places cannot fit 2 parameters"):
        fit(Points([10.0, 100.0], [2.1, 2.2], base=2.0), LAWS["base"])


def test_all_faults_of_points_at_once():
    with pytest.raises(FitError) as told:
        Points([0.0, 10.0], [2.0, math.nan], size=[1.0], base=-1.0)
    assert len(told.value.faults) == 4


def test_warnings_in_words():
    points = synthetic("base", np.random.default_rng(0))
    assert fit(points, LAWS["base"], draws=20).said == ()
    two = fit(points.where(points.size < 64), LAWS["base"], draws=20)
    assert any("α rests on two sizes" in told for told in two.said)
    one = fit(points.where(points.seed == 0), LAWS["base"], draws=20)
    assert any("one seed" in told for told in one.said)
    shared = fit(synthetic("base", np.random.default_rng(0), together=0.02), LAWS["base"], draws=20)
    assert any("go up and down together" in told for told in shared.said)
    none = fit(points, LAWS["drift"], draws=40)
    assert any("E is not told from 0" in told for told in none.said)


def test_a_prediction_holds_the_mean_and_one_run():
    found = fit(synthetic("drift", np.random.default_rng(3)), LAWS["drift"], draws=100)
    told = found.predict(1e6, 16)
    truth = BASE + LAWS["drift"].forgetting(PLANTED["drift"], 1e6, 16)
    assert told.interval[0] < truth < told.interval[1]
    assert told.run[0] < told.interval[0] < told.loss < told.interval[1] < told.run[1]
    assert told.forgetting == told.loss - BASE
    assert told.beyond == pytest.approx(1)
    assert "guess" not in told.sentence()
    assert "a guess about the form" in found.predict(1e9, 16).sentence()
    assert found.curve([1e6], 16)[:, 0] == pytest.approx([told.loss, *told.interval])
    again = fit(synthetic("drift", np.random.default_rng(3)), LAWS["drift"], draws=100)
    assert again.as_dict() == found.as_dict()


@pytest.mark.parametrize("law", ["base", "drift", "injected", "shifted"])
def test_the_true_form_foretells_best(law):
    points = synthetic(law, np.random.default_rng(0), noise=1e-4)
    told = compare(points)
    true = next(one for one in told if one.law == law)
    assert told[0].error == pytest.approx(true.error, abs=2e-3)  # the drift form holds the base form
    assert true.error < 0.1 * told[-1].error
    assert told[-1].law == LAST_SEEN
    assert true.held_out + true.fitted == len(points)
    assert 0 < true.noise < 2e-4


def test_held_out_error_by_hand():
    """Flat up to D = 100, twice as much beyond: whoever saw the first part foretells half of the second."""
    law, last = compare(Points([1.0, 10, 100, 1000], [2.0, 2.0, 2.0, 4.0], base=0.0), [LAWS["base"]])
    assert (law.error, law.bias) == pytest.approx((0.5, -0.5), abs=1e-6)
    assert (last.error, last.bias, last.cut) == (0.5, -0.5, 100.0)
    with pytest.raises(FitError, match="takes three amounts, got 2"):
        compare(Points([1.0, 2.0], [2.0, 3.0]))


def test_a_form_that_cannot_be_fitted_says_why():
    told = {one.law: one for one in compare(exact("base"))}
    assert "B needs at least two shares" in told["injected"].why
    assert math.isnan(told["injected"].error)


def entry(arm, steps, loss, seed=0, split="test", **settings):
    scores = {"text_nll": Score(loss), "skills": Score(0.5), "perplexity.wiki": Score(math.exp(loss))}
    return Entry("shift", arm, {"steps": steps, **settings}, seed, split, scores, cost={"tokens": 10.0 * steps},
                 environment={})  # fmt: skip


def test_points_from_a_ledger():
    entries = [entry("base", 0, 2.0), entry("base", 0, 9.0, split="validation"), entry("plain", 10, 9.9, rank=4),
               entry("plain", 10, 2.1, rank=4), entry("plain", 100, 2.3, seed=1, rank=8), entry("other", 1, 3.0),
               entry("plain", 100, 2.2, rank=4, scale=0.5), entry("plain", 50, 8.0, split="validation")]  # fmt: skip
    points = from_ledger(entries, "text_nll", "tokens", "rank", arm="plain")
    assert points.data.tolist() == [100, 1000]
    assert points.loss.tolist() == [2.1, 2.3]  # the latest of repeats
    assert points.size.tolist() == [4, 8]
    assert points.seed.tolist() == [0, 1]
    assert points.base == 2.0
    assert from_ledger(entries, "text_nll", "steps", arm="plain", base=1.5).base == 1.5
    assert any(
        "differ in rank too (4, 8)" in told for told in from_ledger(entries, "text_nll", "steps", arm="plain").said
    )
    one = from_ledger(entries, "text_nll", "steps", arm="plain", where={"rank": 8})
    assert one.loss.tolist() == [2.3]
    wiki = from_ledger(entries, "perplexity.wiki", "steps", "rank", arm="plain")
    assert wiki.loss == pytest.approx(points.loss)
    assert wiki.base == pytest.approx(2.0)
    assert any("its logarithm is fitted" in told for told in wiki.said)


def test_all_faults_of_a_ledger_at_once():
    entries = [entry("base", 0, 2.0), entry("plain", 10, 2.1, rank="all"), entry("plain", 100, 2.1, rank="all")]
    with pytest.raises(FitError) as told:
        from_ledger(entries, "skills", "step", "rank", arm="plain")
    assert len(told.value.faults) == 3
    for part in ("better when higher", "'step' is missing; the settings and costs are rank, steps, tokens (2 entries)",
                 "'rank' is 'all', not a number"):  # fmt: skip
        assert part in str(told.value)
    with pytest.raises(FitError, match="no finished entry of arm 'nope'"):
        from_ledger(entries, "text_nll", "steps", arm="nope")


def test_a_figure_is_drawn(tmp_path):
    found = fit(synthetic("drift", np.random.default_rng(0)), LAWS["drift"], draws=20)
    path = fit_png({"plain LoRA": found, "TMKL": found}, tmp_path / "new" / "fit.png", "text_nll", "steps", "rank")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_fit_never_loads_torch():
    code = "import sys, holdfast.analysis.extrapolation, holdfast.analysis.fit_figure; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def of_runs(seed=0, together=0.02, noise=0.002, law="base"):
    """Checkpoints of nine runs, which share the noise of their run."""
    return synthetic(law, np.random.default_rng(seed), noise=noise, together=together, shared="runs")


def test_checkpoints_of_a_run_are_drawn_as_one():
    points = of_runs()
    names = groups(points, "runs")
    assert len(set(names)) == len(np.unique(points.run)) == 9
    drawn = weights(names, 50, seed=0)
    for run in np.unique(points.run):
        assert np.ptp(drawn[:, points.run == run], axis=1).max() == 0
    assert len(set(groups(points, "seeds"))) == 3
    alone = Points(points.data, points.loss, points.size, seed=points.seed, base=BASE)
    assert len(set(groups(alone, "runs"))) == len(points)


def test_weights_belong_to_names_have_mean_0_and_deviation_1():
    one, other = weights(["a", "b", "a"], 4000, 3), weights(["c", "a"], 4000, 3)
    assert (one[:, 0] == other[:, 1]).all()
    assert (one[:, 0] == one[:, 2]).all()
    assert one[:, 0].mean() == pytest.approx(0, abs=0.05)
    assert one[:, 0].std() == pytest.approx(1, abs=0.03)
    assert abs(np.corrcoef(one[:, 0], one[:, 1])[0, 1]) < 0.05
    assert (weights(["a"], 20, 3) != weights(["a"], 20, 4)).any()


def test_residuals_are_widened_as_the_formula_says():
    """Against the hat matrix written out, a solve for each group, and t and normal quantiles of a table."""
    random = np.random.default_rng(0)
    slopes, residuals = random.standard_normal((12, 2)), random.standard_normal(12)
    names = [name for name in "abcd" for _ in range(3)]
    hat = slopes @ np.linalg.inv(slopes.T @ slopes) @ slopes.T
    expected = np.concatenate(
        [np.linalg.solve(np.eye(3) - hat[i : i + 3, i : i + 3], residuals[i : i + 3]) for i in range(0, 12, 3)]
    )
    found = widened(residuals, np.linalg.qr(slopes)[0], names, 0.95)
    assert found == pytest.approx(expected * math.sqrt(3 / 4) * 3.182446 / 1.959964, rel=1e-5)  # t of 3 degrees


def test_shared_noise_of_runs_is_in_the_intervals():
    points = of_runs()
    alone = Points(points.data, points.loss, points.size, seed=points.seed, base=BASE)
    whole, naive = (fit(each, LAWS["base"], draws=60).intervals["α"] for each in (points, alone))
    assert whole[1] - whole[0] > 1.3 * (naive[1] - naive[0])
    seeds = fit(points, LAWS["base"], together="seeds", draws=60)
    assert len(seeds.groups) == 3
    assert any("rest on 3 independent groups" in told for told in seeds.said)
    with pytest.raises(FitError, match="All points have one seed"):
        fit(points.where(points.seed == 0), LAWS["base"], together="seeds")
    one = fit(points.where(points.run == 0), LAWS["base"], draws=20)
    assert any("All points are of one run" in told for told in one.said)


def test_a_law_that_misses_its_points_says_so():
    """Runs that level off after the third amount of data are no power law, however little noise they have."""
    points = synthetic("base", np.random.default_rng(0), noise=0.01)
    level = points.where(points.data <= 2000).loss.max() + np.log10(points.data)
    flat = Points(points.data, np.minimum(level, np.where(points.data > 300, 9.0, points.loss)) * points.loss / BASE,
                  points.size, seed=points.seed, base=BASE)  # fmt: skip
    assert any("does not describe these points" in told for told in fit(flat, LAWS["base"], draws=10).said)
    assert not any("does not describe" in told for told in fit(points, LAWS["base"], draws=10).said)


def test_two_arms_are_paired_run_by_run():
    """What both share cancels: the difference is far surer than either law."""
    points = of_runs(noise=0.0005, together=0.03)
    other = Points(points.data, points.loss * 0.99, points.size, seed=points.seed, run=points.run, base=BASE)
    mine, theirs = (fit(each, LAWS["base"], draws=60) for each in (other, points))
    told = fit_pairs.of_forgetting(mine, theirs, 1e4, 16)
    expected = [found.predict(1e4, 16) for found in (mine, theirs)]
    assert told.value == pytest.approx(expected[0].loss - expected[1].loss)
    assert told.verdict == "less"
    width = expected[1].interval[1] - expected[1].interval[0]
    assert told.high - told.low < 0.2 * width
    assert expected[0].interval[1] > expected[1].interval[0]  # apart, they are not told from each other
    ratio = fit_pairs.of_parameter(mine, theirs, "A")
    assert ratio.value == pytest.approx(math.log(mine.parameters["A"] / theirs.parameters["A"]))


def test_fits_that_were_not_drawn_together_are_not_paired():
    points = of_runs()
    whole = fit(points, LAWS["base"], draws=10)
    part = fit(points.where(points.run > 0), LAWS["drift"], draws=20)
    with pytest.raises(FitError) as told:
        fit_pairs.of_forgetting(whole, part, 1e4, 16)
    assert [fault.split()[0] for fault in told.value.faults] == ["one", "they", "they"]
    assert "seed 0, N 4, p 0, up to D 100000" in told.value.faults[1]
    one = fit(points.where(points.size == 4), LAWS["base"], draws=10)
    with pytest.raises(FitError, match="α cannot be known"):
        fit_pairs.of_parameter(one, one, "α")


def test_checkpoints_in_a_ledger_are_of_one_run():
    entries = [entry("base", 0, 2.0)]
    for steps, settings in ((10, {"rank": 4, "checkpoint": 10}), (100, {"rank": 4})):
        for seed in (0, 1):
            scores, cost = {"text_nll": Score(2 + steps / 1000)}, {"steps": float(steps)}
            entries.append(Entry("shift", "plain", settings, seed, "test", scores, cost=cost, environment={}))
    points = from_ledger(entries, "text_nll", "steps", "rank", arm="plain")
    assert points.data.tolist() == [10, 10, 100, 100]
    assert points.run.tolist() == [0, 1, 0, 1]
    assert points.said == ()


@pytest.mark.slow
@pytest.mark.parametrize(("shared", "draw"), [("runs", "runs"), ("seeds", "seeds")])
def test_intervals_hold_what_was_planted_in_shared_noise(shared, draw):
    """As below; with three seeds the quantile of Student's t is that of two degrees, and it holds."""
    sets = 100
    for name, held in coverage("base", sets, draws=60, together=0.02, shared=shared, draw=draw).items():
        assert held >= 0.85 * sets, (name, held)


@pytest.mark.slow
@pytest.mark.parametrize("law", ["base", "drift"])
def test_intervals_hold_what_was_planted(law):
    """Over 200 sets at 95 %: below 180 would happen by chance less than once in 500 tests."""
    sets = 200
    for name, held in coverage(law, sets, draws=60).items():
        assert held >= 0.90 * sets, (name, held)
