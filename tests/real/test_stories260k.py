"""Real weights: stories260K from llama2.c's files tells the documented story and splits text as llama2.c does.

Skipped where HOLDFAST_DATA does not name the folder with tinylm/ and shift/.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

DATA = Path(os.environ.get("HOLDFAST_DATA", ""))
HAVE = "HOLDFAST_DATA" in os.environ and (DATA / "tinylm/stories260K.bin").is_file()
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not HAVE, reason="HOLDFAST_DATA is not set to the folder with tinylm/stories260K.bin"),
]
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STORY = (  # as llama2.c's doc/stories260K.md prints it
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\nLily's mom said, \"Lily, let's go to the park.\""
)


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    import stories260k

    yield stories260k
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def converted(example, tmp_path_factory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = example.convert(DATA / "tinylm", tmp_path_factory.mktemp("stories260K"))
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_its_greedy_story_is_the_documented_one(converted):
    model, tokenizer = converted
    ids = model.generate(torch.tensor([[1]]), max_new_tokens=100, do_sample=False)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).startswith(STORY)
    assert tokenizer(tokenizer.decode(ids[0], skip_special_tokens=True))["input_ids"] == ids[0].tolist()


def merged(text, pieces):
    """llama2.c's own encoding, slowly: merge the pair of the best score, the leftmost first, until none is left."""
    place = {piece: i for i, (piece, _) in enumerate(pieces)}
    ids = []
    for letter in "▁" + text.replace(" ", "▁"):
        ids += [place[letter]] if letter in place else [byte + 3 for byte in letter.encode()]
    while True:
        pairs = [(pieces[a][0] + pieces[b][0], i) for i, (a, b) in enumerate(pairwise(ids))]
        known = [(-pieces[place[pair]][1], i, place[pair]) for pair, i in pairs if pair in place]
        if not known:
            return [1, *ids]
        _, i, whole = min(known)
        ids[i : i + 2] = [whole]


def test_the_tokenizer_merges_as_llama2_c_does(example, converted):
    _, tokenizer = converted
    pieces = example.read_pieces(DATA / "tinylm/tok512.bin")
    lines = (DATA / "shift/wikisql_test_1000.jsonl").read_text().splitlines()[:150]
    for text in [json.loads(line)["question"] for line in lines] + ["", "é ☃ 東京", "a  b\n\nc "]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        if text:
            assert ids == merged(text, pieces)


def test_a_file_that_is_something_else_is_refused(example, tmp_path):
    (tmp_path / "x.bin").write_bytes((DATA / "tinylm/stories260K.bin").read_bytes() + b"\0\0\0\0")
    with pytest.raises(ValueError, match="not a version 0 file"):
        example.read_model(tmp_path / "x.bin")
