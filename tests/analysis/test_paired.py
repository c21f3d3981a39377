"""Paired statistics against scipy, textbook values and slow twins; coverage over seeded simulations."""

import math
from itertools import pairwise

import numpy as np
import pytest
from holdfast.analysis.changes import change
from holdfast.analysis.evidence import Apart, Flips, Resampled, Unchanged
from holdfast.analysis.paired import adjusted, by_category, drifts, reduction
from holdfast.analysis.rates import mcnemar, wilson
from holdfast.analysis.scores import ScoreKind
from holdfast.drift.ledger import Score
from holdfast.drift.probes.refusal import balanced, pair_accuracy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import minimize_scalar

counts = st.integers(0, 60)


def score(items, log=False):
    mean = float(np.mean(items))
    return Score(math.exp(mean) if log else mean, items=tuple(map(float, items)))


def flips(lost, gained, same):
    """Base and tuned scores with these many flips; of the items that stay, every other one is right."""
    kept = [i % 2 for i in range(same)]
    return score([1] * lost + [0] * gained + kept), score([0] * lost + [1] * gained + kept)


# rates


@pytest.mark.parametrize("n", [1, 2, 7, 40, 270])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_is_scipys(n, confidence):
    for hits in {0, 1, n // 2, n - 1, n}:
        theirs = stats.binomtest(hits, n).proportion_ci(confidence, method="wilson")
        assert wilson(hits, n, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_of_no_items_knows_nothing():
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 hits of 2 items"):
        wilson(3, 2)


# McNemar


@given(counts, counts)
def test_exact_mcnemar_is_the_binomial_test_of_the_flips(lost, gained):
    theirs = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(theirs, rel=1e-9)
    assert 0 < mcnemar(lost, gained, mid=True) <= mcnemar(lost, gained)


def test_mcnemar_of_the_textbook():
    """Fagerland, Lydersen and Laake (2013), airways before and after transplantation: 1 against 7."""
    assert round(mcnemar(1, 7), 3) == 0.070
    assert round(mcnemar(7, 1, mid=True), 3) == 0.039
    assert mcnemar(0, 6) == pytest.approx(0.03125)  # data.md: six one-way flips give p = 0.03
    assert mcnemar(0, 0) == mcnemar(0, 0, mid=True) == 1.0
    assert mcnemar(5, 5, mid=True) == pytest.approx(1.0)


# intervals of right-or-wrong items


def slow_score_statistic(lost, gained, n, d):
    """Tango's z, half an item nearer to 0, with the likeliest rate of losses found by search instead of by formula."""

    def unlikely(q):
        return -(stats.multinomial.logpmf([gained, lost, n - gained - lost], n, [q + d, q, 1 - 2 * q - d]))

    low, high = max(0.0, -d), (1 - d) / 2
    q = minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    off = gained - lost - n * d
    return (off - math.copysign(0.5, off)) / math.sqrt(n * (2 * q + d * (1 - d)))


@pytest.mark.parametrize(("lost", "gained", "n"), [(12, 2, 50), (1, 7, 21), (0, 5, 40), (6, 0, 270), (30, 30, 100)])
def test_the_interval_ends_where_the_slow_statistic_is_the_quantile(lost, gained, n):
    low, high = change(*flips(lost, gained, n - lost - gained)).interval(0.95)
    assert slow_score_statistic(lost, gained, n, low) == pytest.approx(1.959964, abs=2e-3)
    assert slow_score_statistic(lost, gained, n, high) == pytest.approx(-1.959964, abs=2e-3)


@given(counts, counts, counts)
def test_swapping_base_and_tuned_turns_drift_round(lost, gained, same):
    assume(lost + gained)
    base, tuned = flips(lost, gained, same)
    there, back = change(base, tuned), change(tuned, base)
    low, high = there.interval()
    assert -1 <= low <= there.value <= high <= 1
    assert high > low
    assert back.value == -there.value
    assert back.interval() == pytest.approx((-high, -low), abs=1e-9)


@given(counts, counts, counts, st.floats(-0.9, 0.9), st.sampled_from([0.8, 0.95, 0.999]))
def test_the_interval_leaves_out_what_p_rejects(lost, gained, same, against, confidence):
    assume(lost + gained)
    found = change(*flips(lost, gained, same))
    low, high = found.interval(confidence)
    assume(min(abs(against - low), abs(against - high)) > 1e-6)
    assert (low < against < high) == (found.p(against) > 1 - confidence)


# intervals of other items


def paired_losses(n, seed=0, shift=0.1):
    random = np.random.default_rng(seed)
    base = random.gamma(4, 0.5, n)
    return base, base + shift + random.gumbel(0, 0.3, n) - 0.3 * 0.5772


def test_the_bootstrap_is_scipys_up_to_the_widening():
    base, tuned = paired_losses(300)
    low, high = change(score(base), score(tuned)).interval(0.9)
    theirs = stats.bootstrap(
        (tuned - base,), np.mean, confidence_level=0.9, n_resamples=9999, method="BCa", rng=np.random.default_rng(1)
    ).confidence_interval
    error = (tuned - base).std() / math.sqrt(300)  # two runs of 10,000 draws differ by about 0.02 errors at each end
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.1 * error)


def test_a_perplexity_is_compared_on_its_items_logarithm():
    base, tuned = paired_losses(200)
    before, after = score(base, log=True), score(tuned, log=True)
    moved = tuned.mean() - base.mean()
    assert change(before, after, relative=True).value == pytest.approx(math.expm1(moved))
    assert change(before, after).value == pytest.approx(after.value - before.value)
    of_losses = change(score(base), score(tuned)).interval()
    assert change(before, after, relative=True).interval() == pytest.approx(tuple(np.expm1(of_losses)), rel=0.05)


def test_p_of_a_bootstrap_agrees_with_its_interval():
    found = change(*(score(x) for x in paired_losses(60)))
    for confidence in (0.8, 0.9, 0.95, 0.99):
        for bound in found.interval(confidence):
            assert found.p(bound) == pytest.approx(1 - confidence, abs=0.15 * (1 - confidence) + 1e-3)
    assert found.p(found.value) > 0.8


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("items", [[1, 1, 0, 1], [0.0] * 30, [2.5, 3.1, 0.1], [1]])
@pytest.mark.parametrize("log", [False, True])
def test_the_same_model_twice_has_no_drift_at_all(items, log, relative):
    same = score(items, log=log)
    found = change(same, same, relative=relative)
    assert (found.value, found.interval(), found.p()) == (0.0, (0.0, 0.0), 1.0)
    assert isinstance(found, Unchanged)


def test_what_no_change_on_few_items_cannot_rule_out():
    found = change(score([1] * 100), score([1] * 100))
    assert found.unseen() == pytest.approx(stats.binomtest(0, 100).proportion_ci(0.9, method="exact").high)
    assert change(score([2.5] * 100), score([2.5] * 100)).unseen() == 0.0


def test_small_and_degenerate_items():
    with pytest.raises(ValueError, match="0 items"):
        change(Score(0.5, items=()), Score(0.5, items=()))
    with pytest.raises(ValueError, match="2 items and the tuned model on 1"):
        change(score([1, 0]), score([1]))
    assert change(score([1]), score([0])).interval() == pytest.approx((-1.0, 0.76), abs=0.01)  # one flip: hardly known
    assert change(score([1.5]), score([2.5])).interval() == (-math.inf, math.inf)
    low, high = change(score([1] * 30), score([0] * 30)).interval()
    assert low == -1.0
    assert -0.9 < high < -0.7  # not [-1, -1]: thirty items are not all items
    assert change(score([1.5] * 9), score([2.0] * 9)).interval() == pytest.approx((0.5, 0.5))


def test_a_share_of_nothing_is_unknown_not_nan():
    found = change(score([0] * 30), score([0, 1] * 15), relative=True)
    assert found.interval() == (-math.inf, math.inf)
    assert found.p() == 1.0


def test_order_does_not_matter():
    random = np.random.default_rng(0)
    base, tuned = paired_losses(50)
    ours = base + 0.3 * (tuned - base)
    for _ in range(5):
        turn = random.permutation(50)
        for make in (lambda x: score(x), lambda x: score(x, log=True), lambda x: score(x > 2)):
            straight = change(make(base), make(tuned))
            mixed = change(make(base[turn]), make(tuned[turn]))
            assert (mixed.interval(), mixed.p(0.05)) == (straight.interval(), straight.p(0.05))
            assert mixed.value == pytest.approx(straight.value)
        assert reduction(*(score(x[turn]) for x in (base, ours, tuned)))[1] == pytest.approx(
            reduction(*(score(x) for x in (base, ours, tuned)))[1]
        )


def test_without_items_standard_errors_count():
    found = change(Score(0.9, standard_error=0.03), Score(0.8, standard_error=0.04))
    assert found.interval() == pytest.approx((-0.1 - 1.96 * 0.05, -0.1 + 1.96 * 0.05), abs=1e-4)
    assert found.p() == pytest.approx(2 * stats.norm.sf(2))
    assert change(Score(0.9), Score(0.8)).interval() == (-math.inf, math.inf)
    assert change(Score(0.9, n=100), Score(0.8, n=100), share=True).interval()[1] < 0.03
    losses = score([1.0, 2.0, 3.0] * 10, log=True)  # a perplexity that has items, against one that has none
    error = losses.value * float(np.std(losses.items, ddof=1)) / math.sqrt(30)
    assert change(losses, Score(9.0, standard_error=0.0)).error == pytest.approx(error)
    other_items = Score(7.0, items=(1.0, 2.0, 3.0))  # neither their mean nor its exponential
    assert isinstance(change(other_items, other_items), Apart)


def misses(truth, intervals):
    """How often the truth lies below, and above, the interval."""
    return sum(truth < low - 1e-12 for low, _ in intervals), sum(truth > high + 1e-12 for _, high in intervals)


@pytest.mark.parametrize(
    ("n", "lost", "gained"), [(100, 0.02, 0.02), (100, 0.1, 0.0), (270, 0.02, 0.0), (40, 0.4, 0.1)]
)
def test_coverage_where_few_items_flip(n, lost, gained):
    """Nominal 2.5 % a side. Exact enumeration (docs/gate.md) finds at most 3.4 %: the bar adds 2.5 standard errors.

    A percentile bootstrap misses up to 15 % where it should miss 5 %, and would fail.
    """
    drawn = np.random.default_rng(0).multinomial(n, [lost, gained, 1 - lost - gained], size=300)
    below, above = misses(gained - lost, [change(*flips(*row)).interval() for row in drawn])
    assert max(below, above) <= 300 * 0.060


@pytest.mark.parametrize(("tail", "bar"), [(0.025, 0.035), (0.0025, 0.005)])
def test_the_exact_chance_of_a_false_alarm_where_flips_are_few(tail, bar):
    """By enumeration: at most 3.4 % for a tail of 2.5 %, under the 5 % that a gate states; 0.49 % for one of ten."""
    worst = 0.0
    for n, truth, down in [(50, 0.1, 0.0), (240, 0.05, 0.002), (500, 0.01, 0.002), (500, 0.02, 0.0), (100, 0.03, 0.02)]:
        up = truth + down
        gained, lost = (range(int(n * p + 8 * math.sqrt(n * p + 1) + 6)) for p in (up, down))
        worst = max(
            worst,
            sum(
                stats.multinomial.pmf([g, b, n - g - b], n, [up, down, 1 - up - down])
                for g in gained
                for b in lost
                if g - b > n * truth and Flips((g - b) / n, n, "", b, g).p(truth) < 2 * tail
            ),
        )
    assert 0.5 * tail < worst <= bar


@pytest.mark.parametrize(
    ("draw", "truth", "bar"),
    [
        (lambda random, n: random.normal(0, 1, n), 0.0, 0.05),
        (lambda random, n: random.chisquare(1, n), 1.0, 0.08),  # like a KL: at least 0, a long tail
    ],
)
def test_coverage_of_the_bootstrap(draw, truth, bar):
    """Nominal 2.5 % a side, 50 items; docs/gate.md has 2.8 %, for the tail 4.5 %. Bars: 2.5 standard errors more."""
    random, found = np.random.default_rng(0), []
    for _ in range(300):
        base = random.gamma(4, 0.5, 50)
        found.append(change(score(base), score(base + draw(random, 50)), draws=1000).interval())
    assert max(misses(truth, found)) <= 300 * bar


# many scores


def test_holm_is_the_definition():
    p = [0.01, 0.04, 0.03, 0.005]
    assert adjusted(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjusted([]) == []
    assert adjusted([0.7, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_corrections_keep_the_order_and_only_raise(p):
    order = np.argsort(p, kind="stable")
    for correction in ("holm", "bh"):
        found = np.array(adjusted(p, correction))
        assert (found >= np.array(p) - 1e-12).all()
        assert (found <= 1).all()
        assert all(a <= b + 1e-12 for a, b in pairwise(found[order]))
    assert (np.array(adjusted(p, "bh")) <= np.array(adjusted(p, "holm")) + 1e-12).all()
    assert adjusted(p, "none") == p


def test_drifts_are_signed_and_forgetting_is_harm():
    base = {
        "refusal": score([1] * 50),
        "over_refusal": score([0] * 50),
        "story_perplexity": score([2.0] * 50, log=True),
    }
    tuned = {
        "refusal": score([0] * 10 + [1] * 40),
        "over_refusal": score([1] * 5 + [0] * 45),
        "story_perplexity": base["story_perplexity"],
    }
    refusal, over, perplexity = drifts(base, tuned)
    assert (refusal.change.value, refusal.forgetting) == pytest.approx((-0.2, 0.2))
    assert (over.change.value, over.forgetting) == pytest.approx((0.1, 0.1))
    assert (perplexity.change.value, perplexity.interval, perplexity.adjusted) == (0.0, (0.0, 0.0), 1.0)
    assert refusal.p == pytest.approx(stats.binomtest(10, 10).pvalue)
    assert refusal.adjusted == pytest.approx(3 * refusal.p)
    with pytest.raises(ValueError, match="Did you mean 'refusal'"):
        drifts({"refusals": base["refusal"]}, {"refusals": tuned["refusal"]})
    assert (
        drifts({"kl": score([0.0] * 30)}, {"kl": score([0.1, 0.2, 0.3] * 10)}, {"kl": ScoreKind("KL", False)})[0].p
        < 0.01
    )


def test_categories_need_twenty_items():
    items = score([1, 0] * 20)
    found = by_category(items, ["fraud"] * 21 + ["hate"] * 19)
    assert found.keys() == {"fraud"}
    assert found["fraud"].value == pytest.approx(11 / 21)
    losses = score([1.0, 2.0, 3.0], log=True)
    assert by_category(losses, ["a", "a", "b"], least=1)["a"].value == pytest.approx(math.exp(1.5))
    with pytest.raises(ValueError, match="2 labels and 40 items"):
        by_category(items, ["fraud", "hate"])
    with pytest.raises(ValueError, match="0 items"):
        by_category(Score(0.5), ["fraud"])


# drift reduction


def test_a_reduction_is_unknown_where_nothing_drifted():
    random = np.random.default_rng(0)
    base, noise = random.normal(size=60), random.normal(size=60)
    same = score(base)
    value, (low, high) = reduction(same, score(base + noise), score(base + noise[::-1] - noise.mean() + 0.01))
    assert (low, high) == (-math.inf, math.inf)
    assert math.isfinite(value)
    assert math.isnan(reduction(same, same, same)[0])
    assert reduction(same, same, same)[1] == (-math.inf, math.inf)
    assert reduction(same, same, score(base + 1 + 0.1 * noise)) == (1.0, pytest.approx((1.0, 1.0)))
    drifted = score(base + 1 + 0.1 * noise)
    assert reduction(same, drifted, drifted) == (pytest.approx(0.0), pytest.approx((0.0, 0.0), abs=1e-6))
    with pytest.raises(ValueError, match="60, 60, 2"):
        reduction(same, same, score([1.0, 2.0]))


def test_a_reduction_has_the_wanted_coverage():
    """Nominal 95 %; 400 draws of right-or-wrong items put the share within 2.5 standard errors (2.7 %) or better."""
    random, covered = np.random.default_rng(0), 0
    for _ in range(400):
        luck = random.random(120)
        base, ours, plain = np.ones(120), luck > 0.1, luck > 0.4
        low, high = reduction(score(base), score(ours), score(plain))[1]
        covered += low <= 0.75 <= high
    assert covered >= 400 * 0.923


# pairs


def test_refusing_everything_or_nothing_scores_badly():
    yes, no = score([1] * 10), score([0] * 10)
    assert balanced(yes, yes).value == balanced(no, no).value == 0.5
    assert pair_accuracy(yes, no).value == pair_accuracy(no, yes).value == 0.0
    assert balanced(yes, no).value == pair_accuracy(yes, yes).value == 1.0
    with pytest.raises(ValueError, match="got 10 and 0"):
        balanced(yes, Score(0.5))


@settings(max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
def test_balanced_is_the_formula_over_rates(pairs):
    unsafe, safe = (score(side) for side in zip(*pairs, strict=True))
    assert balanced(unsafe, safe).value == pytest.approx((unsafe.value + 1 - safe.value) / 2)


def test_each_kind_of_items_has_its_interval():
    binary, losses = flips(2, 1, 30), tuple(score(x) for x in paired_losses(30))
    kinds = [type(change(*pair)) for pair in (binary, losses, (binary[0], binary[0]), (Score(1), Score(2)))]
    assert kinds == [Flips, Resampled, Unchanged, Apart]
    assert isinstance(change(*binary, relative=True), Resampled)
