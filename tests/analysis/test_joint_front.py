"""Settings of all arms on one front: who beats whom, on which split, and what takes no part."""

import pytest
from holdfast.analysis.joint_front import joint_front, joint_front_rows
from holdfast.analysis.scores import ScoreKind
from holdfast.analysis.tables import markdown_table
from holdfast.drift.ledger import Entry, Score


def both(arm, adaptation, skills, seed=0, test=None, **settings):
    """The two entries of one setting; `test` gives other values there."""
    values = {"validation": (adaptation, skills), "test": test or (adaptation, skills)}
    return [
        Entry("demo", arm, settings, seed, split, {"adaptation": Score(a), "skills": Score(s)}, environment={})
        for split, (a, s) in values.items()
    ]


BASE = both("base", 0.1, 1.0)


def test_settings_are_beaten_across_arms_by_their_means_on_validation():
    entries = [*BASE]
    for seed, luck in enumerate((-0.1, 0.1)):
        entries += both("plain", 0.8 + luck, 0.5, seed, strength=1) + both("plain", 0.4, 0.7, seed, strength=2)
        entries += both("TMKL", 0.8, 0.6 + luck, seed, test=(0.7, 0.3), strength=1)
        entries += both("TMKL", 0.95, 0.1, seed, strength=2)
    found = joint_front(entries)
    assert [(p.arm, p.settings.get("strength"), p.seed) for p in found] == [
        ("base", None, 1), ("plain", 2, 2), ("TMKL", 1, 2), ("TMKL", 2, 2),
    ]  # fmt: skip
    [row] = [row for row in joint_front_rows(found) if row["settings"] == "strength 1"]
    assert row == {
        "arm": "TMKL", "settings": "strength 1", "New task learned": "0.70", "New task learned (chosen on)": "0.80",
        "Old skills kept": "0.30", "Old skills kept (chosen on)": "0.60", "seeds": "2",
    }  # fmt: skip
    assert markdown_table(joint_front_rows(found)).count("\n") == 5


def test_a_setting_that_lacks_a_seed_takes_no_part():
    entries = BASE + both("plain", 0.8, 0.5, 0, strength=1) + both("plain", 0.8, 0.5, 1, strength=1)
    assert len(joint_front(entries)) == 2
    assert len(joint_front(entries + both("plain", 0.9, 0.9, 0, strength=2))) == 2


def test_lower_is_better_and_scales_can_be_left_out():
    kinds = {"adaptation": ScoreKind("Loss", False), "skills": ScoreKind("Perplexity", False)}
    entries = both("base", 4.0, 8.0) + both("plain", 2.0, 12.0, scale=1.0) + both("plain", 3.0, 9.0, scale=0.5)
    entries += both("TMKL", 2.5, 12.5)
    assert [p.chosen["adaptation"].value for p in joint_front(entries, kinds=kinds)] == pytest.approx([2.0, 3.0, 4.0])
    assert len(joint_front(entries, kinds=kinds, scaled=False)) == 2
