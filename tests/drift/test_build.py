"""The builder of driftcheck-10k: what it drops, how it splits, and that the same input gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from holdfast.drift.build import LINKED, NEAR, build
from holdfast.drift.driftcheck.near import alike, clusters, likeness
from holdfast.drift.driftcheck.sources import PAPER, Source
from holdfast.drift.driftcheck.topics import FAMILIES, TOPICS, categorise, sexual_about_minors
from holdfast.drift.suite import CATEGORIES, SuiteError, suite

pytest.importorskip("datasets", reason="reading data sets needs `datasets` (the extra trl)")
WORDS = [f"{a}{b}" for a in ("ba", "do", "ki", "lu", "me", "so", "ta") for b in ("rn", "lt", "mp", "ss", "ck", "nd")]
PAIRED = {"text": "prompt", "expected": "side", "pair": "pair", "licence": "terms"}
SIDES = {"bad": "refuse", "good": "comply"}


def write(folder: Path, name: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def phrases(n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.sample(WORDS, 7)) for _ in range(n)]


@pytest.fixture
def root(tmp_path):
    """A small world of sources: pairs, a labelled unsafe set and a benign one, with duplicates of every kind."""
    pairs = [
        {"prompt": f"{text} {end}", "side": side, "pair": str(i), "terms": "CC0-1.0"}
        for i, text in enumerate(phrases(6, 1))
        for side, end in (("bad", "to hurt him"), ("good", "to help him"))
    ]
    write(tmp_path / "world", "pairs.jsonl", pairs)
    unsafe = [
        {"prompt": f"bomb {text}", "topic": "Malware/Hacking" if i < 3 else ""} for i, text in enumerate(phrases(8, 2))
    ]
    unsafe += [
        {"prompt": pairs[0]["prompt"].upper() + "!", "topic": ""},  # exact duplicate but for case and marks
        {"prompt": unsafe[0]["prompt"] + " please", "topic": ""},  # near duplicate
        {"prompt": "sexy kids", "topic": ""},
        {"prompt": "x " * 900, "topic": ""},
        {"prompt": "both sides claim this text", "topic": ""},
    ]
    write(tmp_path / "world", "unsafe.jsonl", unsafe)
    safe = [{"turns": [text, "and then?"], "input": ""} for text in phrases(20, 3)]
    safe += [{"turns": ["both sides claim this text"], "input": ""}, {"turns": ["needs a text"], "input": "a text"}]
    write(tmp_path / "world", "safe.jsonl", safe)
    return tmp_path


SOURCES = (
    Source("pairs", "world", "see rows", SIDES, "pairs.jsonl", columns=PAIRED),
    Source("unsafe", "world", "MIT", "refuse", "unsafe.jsonl", labels=("topic",)),
    Source("safe", "world", "CC-BY-4.0", "comply", "safe.jsonl", columns={"text": "turns"}, keep={"input": ("",)}),
)


def test_each_step_drops_what_it_should_and_says_so(root, tmp_path):
    manifest = build(tmp_path / "out", SOURCES, root)
    steps = manifest["steps"]
    assert steps["read"] == {"unsafe": 19, "safe": 27}
    assert steps["left in"] == {"unsafe": 17, "safe": 27}  # sexual about minors, and too long
    assert steps["exact duplicates out"] == {"unsafe": 15, "safe": 26}  # one copy; the text both sides claim, twice
    assert steps["near duplicates out"] == {"unsafe": 14, "safe": 26}
    assert manifest["missing"] == {"unsafe": 4986, "safe": 4974}
    made = suite(tmp_path / "out" / "driftcheck-10k.jsonl")
    assert len(made.pairs) == 6
    assert manifest["counts"]["pairs"] == 6
    assert len(made) == 40
    assert manifest["counts"]["licence"]["CC0-1.0"] == {"unsafe": 6, "safe": 6}
    assert manifest["counts"]["category"]["cyber"] == {"unsafe": 3, "safe": 0}
    texts = {prompt.text for prompt in made.prompts}
    assert not texts & {"sexy kids", "both sides claim this text", "needs a text"}


def test_same_input_and_seed_same_bytes_another_seed_another_choice(root, tmp_path):
    out = [tmp_path / name for name in "abc"]
    manifests = [
        build(folder, SOURCES, root, per_side=8, seed=seed) for folder, seed in zip(out, (0, 0, 1), strict=True)
    ]
    data = [(folder / "driftcheck-10k.jsonl").read_bytes() for folder in out]
    notes = [(folder / "driftcheck-10k.manifest.json").read_text() for folder in out]
    assert data[0] == data[1]
    assert notes[0] == notes[1]
    assert data[0] != data[2]
    assert manifests[0]["sha256"] == hashlib.sha256(data[0]).hexdigest()
    assert json.loads(notes[0]) == json.loads(json.dumps(manifests[0]))
    assert manifests[0]["steps"]["chosen"] == {"unsafe": 8, "safe": 8}
    assert str(root) not in notes[0], "no names of folders"


def test_near_duplicates_never_straddle_a_split(tmp_path):
    rng = random.Random(5)
    rows = []
    for text in phrases(25, 4):  # families of texts that differ in one or two words
        for _ in range(4):
            told = text.split()
            for place in rng.sample(range(7), rng.choice((1, 2))):
                told[place] = rng.choice(WORDS)
            rows.append({"prompt": " ".join(told), "side": rng.choice(("bad", "good")), "pair": "", "terms": "MIT"})
    write(tmp_path / "world", "pairs.jsonl", rows)
    build(tmp_path / "out", SOURCES[:1], tmp_path)
    prompts = suite(tmp_path / "out" / "driftcheck-10k.jsonl").prompts
    close = [(a, b) for a, b in combinations(prompts, 2) if likeness(a.text, b.text) >= LINKED]
    assert len(close) >= 10
    assert len({prompt.split for prompt in prompts}) == 3
    assert all(a.split == b.split for a, b in close)
    assert not [1 for a, b in close if a.expected == b.expected and likeness(a.text, b.text) >= NEAR]


def test_categories_are_filled_to_one_level(tmp_path):
    rows = [
        {"prompt": f"{word} {text}", "topic": ""}
        for word, n, seed in (("bomb", 12, 6), ("malware", 3, 7))
        for text in phrases(n, seed)
    ]
    write(tmp_path / "world", "unsafe.jsonl", rows)
    manifest = build(tmp_path / "out", SOURCES[1:2], tmp_path, per_side=8)
    assert manifest["counts"]["category"] == {"cyber": {"unsafe": 3, "safe": 0}, "violence": {"unsafe": 5, "safe": 0}}
    assert manifest["missing"] == {"unsafe": 0, "safe": 8}


def test_all_sources_that_cannot_be_read_are_named_and_nothing_is_written(root, tmp_path):
    broken = (
        replace(SOURCES[0], name="gone", path="nowhere"),
        replace(SOURCES[1], name="columns", columns={"text": "instruction"}),
        replace(SOURCES[2], name="file", file="no.jsonl"),
        SOURCES[0],
    )
    with pytest.raises(SuiteError) as caught:
        build(tmp_path / "out", broken, root)
    told = str(caught.value)
    assert "gone: there is no folder 'nowhere'" in told
    assert "columns: no column instruction; it has prompt, topic" in told
    assert "file: 'world' cannot be read" in told
    assert len(caught.value.faults) == 3
    assert not (tmp_path / "out").exists()


def test_a_data_set_of_the_hub_that_is_out_of_reach_is_a_clear_error(tmp_path):
    with pytest.raises(SuiteError, match=r"mmlu: 'cais/mmlu' cannot be read"):
        build(tmp_path / "out", PAPER[:1], tmp_path)


def test_output_stays_out_of_the_repository_and_off_files(root, tmp_path):
    with pytest.raises(SuiteError, match="repository"):
        build(Path(__file__).parent / "made", SOURCES, root)
    (tmp_path / "taken").write_text("")
    with pytest.raises(SuiteError, match="is a file"):
        build(tmp_path / "taken", SOURCES, root)
    with pytest.raises(SuiteError, match="per_side is 0"):
        build(tmp_path / "out", SOURCES, root, per_side=0)


def test_the_papers_sources_on_local_copies_of_their_columns(tmp_path):
    """The hub's data sets as their cards describe the columns; the same call reads a folder and the hub."""
    write(tmp_path / "cais/mmlu", "test.jsonl", [{"question": text, "choices": ["a"]} for text in phrases(4, 8)])
    flags = {"S": 0, "H": 0, "V": 0, "HR": 0, "SH": 0, "S3": 0, "H2": 0, "V2": 0}
    rows = [{"prompt": text} | flags | {"V": 1} for text in phrases(2, 9)]
    rows += [{"prompt": phrases(1, 10)[0]} | flags, {"prompt": phrases(1, 11)[0]} | flags | {"S": 1, "S3": 1}]
    write(tmp_path / "mmathys/openai-moderation-api-evaluation", "train.jsonl", rows)
    statements = [("hateful", text) for text in phrases(2, 12)] + [("non-hateful", "hello there")]
    write(
        tmp_path / "Paul/hatecheck",
        "test.jsonl",
        [{"label_gold": gold, "test_case": text} for gold, text in statements],
    )
    turns = ["\n\nHuman: how do I build a bomb?\n\nAssistant: No.", "\n\nHuman: hi there\n\nAssistant: Hello."]
    write(tmp_path / "Anthropic/hh-rlhf", "train.jsonl", [{"chosen": turn, "rejected": turn} for turn in turns])
    sources = [replace(source, config=None) for source in PAPER]
    manifest = build(tmp_path / "out", sources, tmp_path)
    assert manifest["steps"]["chosen"] == {"unsafe": 5, "safe": 4}
    counts = manifest["counts"]["category"]
    assert {name: count["unsafe"] for name, count in counts.items()} == {"hate": 2, "violence": 3, "other": 0}
    assert "how do I build a bomb?" in {p.text for p in suite(tmp_path / "out" / "driftcheck-10k.jsonl").prompts}


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 1.0])
def test_the_search_for_likeness_misses_nothing(threshold):
    rng = random.Random(7)
    texts = [" ".join(rng.choices(WORDS[:12], k=rng.randint(1, 8))) for _ in range(120)] + ["", "..."]
    slow = {(i, j) for i, j in combinations(range(len(texts)), 2) if likeness(texts[i], texts[j]) >= threshold}
    assert slow
    assert {(i, j) for i, j, _ in alike(texts, threshold)} == slow


def test_a_threshold_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        list(alike(["a"], 0.0))


def test_clusters_follow_every_link():
    assert clusters(6, [(0, 5), (4, 2), (5, 4)]) == [0, 1, 0, 3, 0, 0]


def test_topics_lead_to_categories_and_these_to_families():
    assert set(TOPICS.values()) <= set(CATEGORIES)
    assert {FAMILIES.get(category, category) for category in CATEGORIES} == {
        "violence", "hate", "illegal_activity", "explicit_content", "privacy", "disinformation",
    }  # fmt: skip
    assert categorise("How do I murder somebody?") == "violence"
    assert categorise("Name a river") == "other"
    assert sexual_about_minors("pedophilia")
    assert not sexual_about_minors("How do I kill a child process?")
