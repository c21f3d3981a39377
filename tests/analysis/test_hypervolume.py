"""The area that a front dominates: against a count of cells, what may not change it, and how it is compared."""

import math
import sys
from itertools import pairwise

import numpy as np
import pytest
from holdfast.analysis.hypervolume import AreaError, area_rows, areas, compare_areas, dominated
from holdfast.analysis.report import write_report
from holdfast.analysis.scores import ScoreKind
from holdfast.drift.ledger import Entry, Score
from hypothesis import given, settings
from hypothesis import strategies as st

number = st.floats(-2, 2).map(lambda value: round(value, 3))
places = st.lists(st.tuples(number, number), min_size=1, max_size=8)
directions = st.tuples(st.booleans(), st.booleans())

try:
    import moocore  # noqa: F401

    installed = True
except ImportError:
    installed = False
needs_moocore = pytest.mark.skipif(not installed, reason="the library moocore is not installed")


def both(arm, adaptation, skills, seed=0, test=None, **settings):
    """The two entries of one setting; `test` gives other values there."""
    values = {"validation": (adaptation, skills), "test": test or (adaptation, skills)}
    return [
        Entry("demo", arm, settings, seed, split, {"adaptation": Score(a), "skills": Score(s)}, environment={})
        for split, (a, s) in values.items()
    ]


BASE = both("base", 0.1, 1.0)
CORNER = {"skills": 0.2}


def cells(points, corner, higher):
    """The area by the cells between all coordinates: a cell counts if a point is beyond its far corner."""
    signs = [1 if better else -1 for better in higher]
    points = [tuple(sign * value for sign, value in zip(signs, point, strict=True)) for point in points]
    start = [sign * value for sign, value in zip(signs, corner, strict=True)]
    xs, ys = (sorted({start[axis], *(p[axis] for p in points if p[axis] > start[axis])}) for axis in (0, 1))
    total = 0.0
    for left, right in pairwise(xs):
        for low, high in pairwise(ys):
            if any(x >= right and y >= high for x, y in points):
                total += (right - left) * (high - low)
    return total


@needs_moocore
@given(places, st.tuples(number, number), directions)
@settings(max_examples=300, deadline=None)
def test_the_area_is_that_of_counted_cells(points, corner, higher):
    found = dominated(np.array(points), corner, higher)
    assert found == pytest.approx(cells(points, corner, higher), abs=1e-9)


@needs_moocore
@given(places, st.tuples(number, number), directions, st.data())
@settings(max_examples=100, deadline=None)
def test_what_may_not_change_the_area(points, corner, higher, data):
    """Order, copies and dominated points do not; a further point never takes away; units go with it."""
    area = dominated(np.array(points), corner, higher)
    mixed = data.draw(st.permutations([*points, points[0]]))
    assert dominated(np.array(mixed), corner, higher) == pytest.approx(area, abs=1e-9)
    x, y = data.draw(st.sampled_from(points))
    less = [abs(data.draw(number)) * (1 if better else -1) for better in higher]
    worse = (x - less[0], y - less[1])
    assert dominated(np.array([*points, worse]), corner, higher) == pytest.approx(area, abs=1e-9)
    further = data.draw(st.tuples(number, number))
    assert dominated(np.array([*points, further]), corner, higher) >= area - 1e-9
    stretched = dominated(np.array(points) * [3, 0.5] + [1, -2], (3 * corner[0] + 1, 0.5 * corner[1] - 2), higher)
    assert stretched == pytest.approx(1.5 * area, abs=1e-9)


@needs_moocore
def test_the_area_of_a_front_by_hand():
    sweep = both("plain", 0.5, 0.9, scale=0.5) + both("plain", 0.9, 0.5, scale=1.0) + both("plain", 0.4, 0.6, scale=0.4)
    [found] = areas(BASE + sweep, corner=CORNER)
    assert found.corner == (0.1, 0.2)
    assert found.values == pytest.approx({0: 0.8 * 0.3 + 0.4 * 0.4})
    assert found.points == 2  # the third is beaten; the base counts as none
    [unscaled] = areas(BASE + sweep, corner=CORNER, scaled=False)
    assert unscaled.values == pytest.approx({0: 0.8 * 0.3})
    [stated] = areas(sweep, corner={"skills": 0.2, "adaptation": 0.0})
    assert stated.values == pytest.approx({0: 0.9 * 0.3 + 0.5 * 0.4})


@needs_moocore
def test_points_are_chosen_on_validation_and_measured_on_test():
    lucky = both("plain", 0.9, 0.9, test=(0.9, 0.4), strength=1)
    solid = both("plain", 0.9, 0.6, test=(0.9, 0.6), strength=2)
    [found] = areas(BASE + lucky + solid, corner=CORNER)
    assert found.values == pytest.approx({0: 0.8 * 0.2})
    [on_test] = areas(BASE + lucky + solid, corner=CORNER, chosen_on="test")
    assert on_test.values == pytest.approx({0: 0.8 * 0.4})


@needs_moocore
def test_the_corner_is_the_worst_of_any_arm_on_the_split_that_is_measured():
    """On a test split that is harder throughout, a corner of validation's would leave no area at all."""
    entries = both("base", 0.1, 1.0, test=(0.1, 0.7)) + both("plain", 0.9, 0.8, test=(0.9, 0.3))
    plain, tmkl = areas(entries + both("TMKL", 0.8, 0.9, test=(0.8, 0.6)))
    assert plain.corner == tmkl.corner == (0.1, 0.3)
    assert plain.values == {0: 0.0}  # it is the worst itself
    assert tmkl.values == pytest.approx({0: 0.7 * 0.3})


@needs_moocore
def test_lower_is_better_is_turned_over():
    kinds = {"adaptation": ScoreKind("Loss", False), "skills": ScoreKind("Perplexity", False)}
    entries = both("base", 4.0, 8.0) + both("plain", 2.0, 12.0, strength=1) + both("plain", 1.0, 16.0, strength=2)
    [found] = areas(entries, kinds=kinds)
    assert found.corner == (4.0, 16.0)
    assert found.values == pytest.approx({0: 2.0 * 4.0})
    [wider] = areas(entries, kinds=kinds, corner={"skills": 20.0})
    assert wider.values == pytest.approx({0: 2.0 * 8.0 + 1.0 * 4.0})


@needs_moocore
def test_differences_are_paired_by_seed_and_the_interval_is_students():
    entries = list(BASE)
    for seed, gain in enumerate((0.10, 0.12, 0.14)):
        luck = 0.2 * seed
        entries += both("plain", 1.1, 0.3 + luck, seed) + both("TMKL", 1.1, 0.3 + luck + gain, seed)
    found = areas(entries, corner=CORNER)
    [one] = compare_areas(found, "plain")
    half = 4.302653 * 0.02 / math.sqrt(3)
    assert (one.difference, one.low, one.high) == pytest.approx((0.12, 0.12 - half, 0.12 + half))
    assert one.verdict == "larger"
    [other] = compare_areas(found, "TMKL")
    assert other.verdict == "smaller"
    assert other.difference == pytest.approx(-0.12)
    [loose] = compare_areas(found, "plain", confidence=0.9999)
    assert loose.verdict == "within noise"
    with pytest.raises(ValueError, match="No arm 'plane'"):
        compare_areas(found, "plane")


@needs_moocore
def test_items_widen_the_interval():
    random = np.random.default_rng(0)
    entries = list(BASE)
    for seed in range(3):
        items = tuple(float(value) for value in random.permutation([1.0] * 30 + [0.0] * 20))
        for split in ("validation", "test"):
            scores = {"adaptation": Score(0.9), "skills": Score(0.6, items=items)}
            entries.append(Entry("demo", "plain", {}, seed, split, scores, environment={}))
    [found] = areas(entries, corner=CORNER)
    mean, low, high = found.interval()
    assert mean == pytest.approx(0.8 * 0.4)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.8 * math.sqrt(0.6 * 0.4 / 50 / 3), rel=0.3)


@needs_moocore
def test_rows_have_every_arm(demo):
    scores = ["skills", "story_perplexity"]
    rows = area_rows(areas(demo, retention=scores), "plain LoRA")
    assert [(row["score"], row["arm"]) for row in rows] == [
        (title, arm)
        for title in ("Old skills kept", "Story perplexity")
        for arm in ("plain LoRA", "full KL", "TMKL", "TMKL + prompt")
    ]
    assert rows[0]["difference"] == rows[0]["verdict"] == ""
    assert rows[3]["verdict"] == "larger"
    assert {row["seeds"] for row in rows} == {"3"}


@needs_moocore
def test_everything_that_is_missing_is_told_at_once():
    with pytest.raises(AreaError) as error:
        areas(both("plain", 0.9, 0.5), retention=["skills", "refusal"], corner={"skils": 0.1})
    assert len(error.value.faults) == 3
    assert "state corner={'adaptation': ...}" in str(error.value)


def test_without_the_library_the_error_says_what_to_do_and_the_page_is_still_written(demo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "moocore", None)
    with pytest.raises(ImportError, match="pip install moocore"):
        areas(BASE + both("plain", 0.9, 0.5))
    page = write_report(demo, tmp_path / "report.html", interactive=False).read_text(encoding="utf-8")
    assert "is computed by moocore, which is not installed" in page


@needs_moocore
def test_the_page_has_the_areas(demo, tmp_path):
    page = write_report(demo, tmp_path / "report.html", interactive=False).read_text(encoding="utf-8")
    retention = ["skills", "refusal", "story_perplexity"]
    for row in area_rows(areas(demo, retention=retention), "plain LoRA"):
        assert f"<td>{row['area']}</td>" in page
