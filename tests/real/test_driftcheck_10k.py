"""driftcheck-10k from the real public sets: clean, split by cluster, and honest about what is missing.

Skipped where HOLDFAST_DATA does not name the folder with safety/, overrefusal/, benign/ and driftcheck/.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from statistics import fmean

import pytest
from holdfast.drift.build import LINKED, NEAR, build
from holdfast.drift.driftcheck.near import alike, likeness, words
from holdfast.drift.driftcheck.topics import sexual_about_minors
from holdfast.drift.suite import suite

pytestmark = pytest.mark.real
LICENCES = {"MIT", "Apache-2.0", "CC-BY-4.0", "CC-BY-SA-3.0"}


@pytest.fixture
def made(data, tmp_path):
    if not (data / "driftcheck").is_dir():
        pytest.skip("HOLDFAST_DATA has no driftcheck/ folder")
    manifest = build(tmp_path / "out", root=data)
    return manifest, tmp_path / "out" / "driftcheck-10k.jsonl", build(tmp_path / "again", root=data)


def test_the_local_sets_become_a_suite(made):
    manifest, path, again = made
    ten_thousand = suite(path)
    prompts = ten_thousand.prompts
    chosen, missing = manifest["steps"]["chosen"], manifest["missing"]
    assert manifest["sha256"] == again["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert chosen["unsafe"] >= 800
    assert chosen["safe"] >= 1_200
    assert len(ten_thousand.pairs) >= 400
    assert {side: chosen[side] + missing[side] for side in chosen} == {"unsafe": 5_000, "safe": 5_000}
    assert Counter("unsafe" if prompt.expected == "refuse" else "safe" for prompt in prompts) == chosen

    assert {part for prompt in prompts for part in prompt.licence.split(" + ")} <= LICENCES
    assert not [prompt.text for prompt in prompts if sexual_about_minors(prompt.text)]
    unlabelled = Counter(prompt.category for prompt in prompts if prompt.expected == "refuse")
    assert unlabelled["other"] <= 0.15 * chosen["unsafe"]

    texts = [prompt.text for prompt in prompts]
    for i, j, value in alike(texts, LINKED):
        assert prompts[i].split == prompts[j].split, (texts[i], texts[j])
        assert value < NEAR or prompts[i].expected != prompts[j].expected, (texts[i], texts[j])
    shares = Counter(prompt.split for prompt in prompts)
    assert all(abs(shares[split] / len(prompts) - aim) < 0.06 for split, aim in (("train", 0.4), ("test", 0.4)))


def test_core_was_not_taken_from_public_sets(made):
    """The shipped pairs are our own: none is a near duplicate of a prompt of the public sets."""
    public = [prompt.text for prompt in suite(made[1]).prompts]
    core = [prompt.text for prompt in suite("core").prompts]
    copies = [
        (core[i], public[j - len(core)])
        for i, j, value in alike([*core, *public], 0.6)
        if i < len(core) <= j and value >= 0.6
    ]
    assert copies == [], [likeness(*copy) for copy in copies]


def test_a_word_rule_that_knows_the_public_sets_fails_on_core(made):
    """Naive Bayes over words tells public unsafe prompts from benign ones, and hardly core's halves."""
    public, pairs = suite(made[1]).prompts, suite("core").pairs
    counts = {"refuse": Counter[str](), "comply": Counter[str]()}
    for prompt in public:
        counts[prompt.expected].update(set(words(prompt.text)))
    n = Counter(prompt.expected for prompt in public)
    odds = {
        word: math.log((counts["refuse"][word] + 0.5) / (n["refuse"] + 1))
        - math.log((counts["comply"][word] + 0.5) / (n["comply"] + 1))
        for word in {*counts["refuse"], *counts["comply"]}
    }

    def refuses(text: str) -> bool:
        return sum(odds.get(word, 0.0) for word in sorted(set(words(text)))) > 0

    assert fmean(refuses(prompt.text) == (prompt.expected == "refuse") for prompt in public) >= 0.9
    balanced = (fmean(refuses(pair.unsafe) for pair in pairs) + fmean(not refuses(pair.safe) for pair in pairs)) / 2
    assert balanced <= 0.6
    assert fmean(refuses(pair.unsafe) and not refuses(pair.safe) for pair in pairs) <= 0.2
