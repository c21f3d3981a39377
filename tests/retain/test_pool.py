"""A pool on disk: whole or not at all, readable, changed by hand, and refused where it does not belong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from holdfast.core.digest import base_digest, tokenizer_digest
from holdfast.core.retain import Retain
from holdfast.retain.kept import Kept, PoolError, id_of
from holdfast.retain.pool import Pool

from tiny import llama, tokenizer


def kept(*ids, kind="text", source="start token", start=0):
    return Kept(id_of(ids), kind, source, tokenizer().decode(list(ids)), ids, start)


@pytest.fixture
def pool():
    sequences = [
        *(kept(9, 10 + i, 30, 31 + i) for i in range(6)),
        *(kept(3, 40 + i, 4, 50, kind="chat", source="no system prompt", start=3) for i in range(3)),
        *(kept(3, 60 + i, kind="noise", source="w1 w2", start=1) for i in range(3)),
    ]
    of = {"tokenizer": {"name": "tiny", "sha256": tokenizer_digest(tokenizer())}}
    base = {"base": {"name": "llama", "sha256": base_digest(llama())}}
    return Pool((), {**of, **base, "dropped": {"chat": {"loop": 2}}}).add(sequences)


def lines_of(folder):
    (path,) = folder.glob("sequences-*.jsonl")
    return path, path.read_text().splitlines()


def test_every_stretch_holds_the_kinds_in_their_shares(pool):
    for start in range(0, 12, 4):
        found = Counter(each.kind for each in pool.sequences[start : start + 4])
        assert found == {"text": 2, "chat": 1, "noise": 1}
    assert pool.counts == {"text": 6, "chat": 3, "noise": 3}


def test_saved_and_loaded_is_the_same(pool, tmp_path):
    pool.save(tmp_path / "a" / "pool")
    found = Pool.load(tmp_path / "a" / "pool", tokenizer=tokenizer(), base=llama())
    assert found.sequences == pool.sequences
    assert found.digest == pool.digest == found.manifest["digest"]
    assert found.manifest["dropped"] == {"chat": {"loop": 2}}
    assert found.manifest["counts"] == pool.counts
    assert not found.edited
    _, lines = lines_of(tmp_path / "a" / "pool")
    assert json.loads(lines[0]) == {
        "id": pool.sequences[0].id, "kind": "text", "source": "start token", "text": "w4 w5 w25 w26",
        "input_ids": [9, 10, 30, 31], "prompt_tokens": 0,
    }  # fmt: skip


def test_the_digest_is_of_what_is_kept(pool):
    others = [
        pool.filter(["text", "chat"]),
        pool.remove([pool.sequences[0].id]),
        Pool(pool.sequences[::-1]),
        Pool((replace(pool.sequences[0], prompt_tokens=1), *pool.sequences[1:])),
    ]
    assert len({pool.digest, *(other.digest for other in others)}) == 5
    assert Pool(pool.sequences, {"settings": "others"}).digest == pool.digest


def test_add_remove_filter(pool):
    more = pool.add([kept(5, 6, 7, kind="own"), pool.sequences[0], kept(5, 6, 7, kind="own")])
    assert more.counts == {**pool.counts, "own": 1}
    assert more.manifest["dropped"] == {"chat": {"loop": 2}, "own": {"duplicate": 1}, "text": {"duplicate": 1}}
    assert pool.manifest["dropped"] == {"chat": {"loop": 2}}
    assert pool.filter(["chat"]).counts == {"chat": 3}
    gone = [pool.sequences[i].id for i in (0, 5)]
    assert not {each.id for each in pool.remove(gone)} & set(gone)
    assert len(pool.remove(gone)) == 10
    with pytest.raises(PoolError) as raised:
        pool.remove([*gone, "nobody", "nothing"])
    assert raised.value.faults == ("nobody", "nothing")
    with pytest.raises(PoolError, match=r"'own' \(there are: text, chat, noise\)"):
        pool.filter(["text", "own"])


def test_batches_are_padded_and_supervised_to_the_last_token(pool):
    short = Pool((kept(9, 8, 7), kept(5, 6), kept(0, 0, 4, 4)))
    first, second = short.batches(0, 2)
    assert first["input_ids"].tolist() == [[9, 8, 7], [5, 6, 0]]
    assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert first["labels"].tolist() == [[9, 8, 7], [5, 6, -100]]
    assert second["labels"].tolist() == [[0, 0, 4, 4]]  # the padding token is no padding where it was written
    retain = Retain(pool.batches(0, 5))
    assert [len(batch["input_ids"]) for batch in retain.take(4)] == [5, 5, 2, 5]
    assert first["input_ids"].dtype == torch.long
    with pytest.raises(PoolError) as raised:
        Pool(()).batches(0, 0)
    assert len(raised.value.faults) == 2


KILLED = """
import os, sys
from pathlib import Path
from holdfast.retain.pool import Pool
import holdfast.core.checkpoint

moments, old = int(sys.argv[3]), Path.replace

def replace(self, target):
    global moments
    moments -= 1
    if moments == 0:
        os._exit(9)
    return old(self, target)

pool = Pool.load(sys.argv[1])
Path.replace = replace
pool.filter(["chat"]).save(sys.argv[2])
"""


@pytest.mark.parametrize("moment", [1, 2])
@pytest.mark.parametrize("there", [True, False])
def test_a_save_that_is_killed_leaves_nothing_half(pool, tmp_path, moment, there):
    source, target = tmp_path / "source", tmp_path / "target"
    pool.save(source)
    if there:
        pool.save(target)
    arguments = [sys.executable, "-c", KILLED, str(source), str(target)]
    assert subprocess.run([*arguments, str(moment)]).returncode == 9
    if there:
        assert Pool.load(target).digest == pool.digest
        assert not Pool.load(target).edited
    else:
        with pytest.raises(PoolError, match="so it is no pool"):
            Pool.load(target)
    assert subprocess.run([*arguments, "0"]).returncode == 0
    assert Pool.load(target).counts == {"chat": 3}
    assert not Pool.load(target).edited
    assert Path(Pool.load(target).manifest["sequences"]).name in {path.name for path in target.iterdir()}


def test_a_pool_replaces_a_pool_and_leaves_other_files_alone(pool, tmp_path):
    pool.save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    pool.save(tmp_path)  # the very same once more
    assert Pool.load(tmp_path).digest == pool.digest
    pool.filter(["noise"]).save(tmp_path)
    assert len(lines_of(tmp_path)[1]) == 3
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "manifest.json").write_text('{"name": "somebody else\'s"}')
    with pytest.raises(PoolError, match="not the manifest of a pool"):
        pool.save(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1, "sequences": "../elsewhere.jsonl"}')
    with pytest.raises(PoolError, match="not the manifest of a pool"):
        pool.save(tmp_path)


def test_a_line_taken_out_by_hand_is_out_of_the_pool(pool, tmp_path):
    path, lines = lines_of(pool.save(tmp_path))
    path.write_text("\n".join(lines[1:]) + "\n\n")
    found = Pool.load(tmp_path, tokenizer=tokenizer(), base=base_digest(llama()))
    assert found.edited
    assert found.sequences == pool.sequences[1:]
    found.save(tmp_path)
    assert not Pool.load(tmp_path).edited


def test_every_fault_of_every_line_is_told(pool, tmp_path):
    path, lines = lines_of(pool.save(tmp_path))
    row = json.loads(lines[0])
    broken = [
        "nonsense",
        "[1]",
        json.dumps({**row, "extra": 1}),
        json.dumps({**row, "kind": "chats", "source": 3}),
        json.dumps({**row, "input_ids": [9, 10, 30]}),
        json.dumps({**row, "input_ids": [9]}),
        json.dumps({**row, "prompt_tokens": 9}),
        lines[0],
        lines[0],
    ]
    path.write_text("\n".join(broken))
    with pytest.raises(PoolError) as raised:
        Pool.load(tmp_path)
    told = [fault.split(":")[0] for fault in raised.value.faults]
    assert told == [f"line {n}" for n in (1, 2, 3, 4, 4, 5, 6, 7, 9)]
    assert "is there already" in raised.value.faults[-1]
    path.unlink()
    with pytest.raises(PoolError, match="cannot be read"):
        Pool.load(tmp_path)


def test_another_tokenizer_and_another_base_are_refused_together(pool, tmp_path):
    pool.save(tmp_path)
    other = tokenizer()
    other.add_tokens(["w90"])
    with pytest.raises(PoolError) as raised:
        Pool.load(tmp_path, tokenizer=other, base=llama(seed=1))
    assert len(raised.value.faults) == 2
    assert "the tokenizer 'tiny'" in raised.value.faults[0]
    assert "the base 'llama'" in raised.value.faults[1]
    with pytest.raises(PoolError, match="other weights or another dtype"):
        Pool.load(tmp_path, base=llama().bfloat16())
    assert Pool.load(tmp_path).digest == pool.digest  # only text to the caller


def test_a_text_changed_without_its_tokens_is_refused(pool, tmp_path):
    path, lines = lines_of(pool.save(tmp_path))
    path.write_text("\n".join([lines[0].replace("w25", "w26"), *lines[1:]]))
    with pytest.raises(PoolError, match="its text was changed but not its input_ids") as raised:
        Pool.load(tmp_path, tokenizer=tokenizer())
    assert len(raised.value.faults) == 1
