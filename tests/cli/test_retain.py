"""`holdfast retain`: a pool from the command line, and what it says of one."""

from __future__ import annotations

import json

import pytest
from holdfast import lab
from holdfast.cli import app
from holdfast.core.errors import HoldfastError
from holdfast.retain.pool import Pool
from typer.testing import CliRunner


def called(*arguments):
    result = CliRunner().invoke(app, ["retain", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments):
    with pytest.raises(HoldfastError) as raised:
        called(*arguments)
    return str(raised.value)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    words = ("b c d", "c d e", "d e f", "e f g", "f g h", "g h i")
    task = [{"prompt": [{"role": "user", "content": f"Rotate: {letters}"}]} for letters in words]
    rows = [{"text": "The kite was safe."}, {"text": "The lamp was safe."}]
    for name, lines in (("task", task), ("rows", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mix = "text=0.25,chat=0.25,noise=0.2,task=0.2,own=0.1"
    given = ["--task", folder / "task.jsonl", "--rows", folder / "rows.jsonl", "--seed", 3, "--device", "cpu"]
    told = called("sample", "lab-aligned", "--output", folder / "pool", "--n", 20, "--mix", mix, *given)
    return folder, told


def test_sample_writes_a_pool_of_this_base(files):
    folder, told = files
    model, tokenizer = lab.load("lab-aligned")
    pool = Pool.load(folder / "pool", tokenizer=tokenizer, base=model)
    assert pool.counts == {"text": 5, "chat": 5, "noise": 4, "task": 4, "own": 2}
    assert pool.manifest["settings"]["seed"] == 3
    assert {kept.source for kept in pool if kept.kind == "own"} == {"rows.jsonl"}
    assert "20 sequences: text 5, chat 5, noise 4, task 4, own 2" in told
    assert "the chat template refuses it" in told


def test_show_tells_what_it_covers(files):
    folder, _ = files
    told = called("show", folder / "pool")
    for kind, count in (("text", 5), ("chat", 5), ("noise", 4), ("task", 4), ("own", 2), ("all", 20)):
        assert any(line.replace("│", " ").split()[:2] == [kind, str(count)] for line in told.splitlines())
    assert "own: rows.jsonl 2" in told
    assert "The kite was safe." in told or "The lamp was safe." in told
    one = called("show", folder / "pool", "--kind", "own")
    assert one.count("safe") == 2
    assert all(kept.id in one for kept in Pool.load(folder / "pool").filter(["own"]))


def test_show_with_the_base_gives_perplexities_and_touches(files):
    folder, _ = files
    probes = ["--probe", "The kite was safe.", "--probe", "bazooka bazooka bazooka", "--device", "cpu"]
    told = json.loads(called("show", folder / "pool", "--model", "lab-aligned", *probes, "--json"))
    parts = {part["kind"]: part for part in told["parts"]}
    assert 1 < parts["text"]["perplexity"] < parts["noise"]["perplexity"]
    assert [touch["overlap"] for touch in told["touches"]] == [1.0, 0.0]
    assert told["edited"] is False
    assert "1.00 (anywhere 1.00)  'The kite was safe.'" in called(
        "show", folder / "pool", "--model", "lab-aligned", *probes
    )
    assert "other weights" in refused("show", folder / "pool", "--model", "lab-pretrained", "--device", "cpu")


def test_faults_are_told_before_anything_is_sampled(files, tmp_path):
    folder, _ = files
    pool = folder / "pool"
    before = Pool.load(pool).digest
    assert "--replace" in refused("sample", "lab-aligned", "--output", pool)
    assert Pool.load(pool).digest == before
    told = refused("sample", "lab-aligned", "--output", tmp_path / "a", "--mix", "chat,text=x")
    assert "'chat' is not KIND=SHARE" in told
    assert "'text=x'" in told
    told = refused("sample", "lab-aligned", "--output", tmp_path / "a", "--mix", "chats=1", "--n", 0)
    assert "did you mean 'chat'?" in told
    assert "n must be" in told
    assert "--dtype" in refused("sample", "lab-aligned", "--output", tmp_path / "a", "--dtype", "float8")
    assert "--probe needs --model" in refused("show", pool, "--probe", "x")
    assert "it is no pool" in refused("show", tmp_path)
    assert not (tmp_path / "a").exists()


def test_replace_replaces(tmp_path):
    for seed in (0, 1):
        called("sample", "lab-aligned", "--output", tmp_path, "--n", 6, "--seed", seed, "--replace", "--device", "cpu")
    assert Pool.load(tmp_path).manifest["settings"]["seed"] == 1
    assert len(list(tmp_path.iterdir())) == 2
