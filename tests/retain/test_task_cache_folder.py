"""The folder of what is kept: nothing stale, files that are whole or not there, built ahead, killed, gone on with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import holdfast
import pytest
import torch
from holdfast.core.errors import ConfigError, NotYetSupported, WrongSetup
from holdfast.methods import FullKL, TargetMaskedKL
from holdfast.retain import task_folder, task_shards
from holdfast.retain.task_folder import contents, manifest
from safetensors import safe_open

import tiny
from task_runs import CPU, assert_same, kept, packed, padded, rows_of, run, tuned

# -- nothing stale


def changed(name):
    """Options and a model that differ in one thing."""
    model, options, methods = tuned(), {}, [TargetMaskedKL()]
    if name == "base weights":
        with torch.no_grad():
            model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight[0, 0] += 1e-3
    elif name == "base configuration":
        model.get_base_model().config.rope_theta = 500.0
    elif name == "head":
        with torch.no_grad():
            model.get_output_embeddings().weight[3, 3] += 1e-3
    elif name == "tokenizer":
        options["tokenizer"] = tiny.tokenizer()
    elif name == "dtype":
        options["cache"] = "float16"
    elif name == "autocast":
        options["autocast"] = True
    return model, methods, options


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("base weights", ["base weights"]), ("base configuration", ["base configuration"]),
        ("head", ["base weights", "head"]), ("tokenizer", ["tokenizer"]), ("dtype", ["dtype"]),
        ("autocast", ["autocast"]),
    ],
)  # fmt: skip
def test_a_folder_of_another_setting_is_refused_by_name(name, told, tmp_path):
    batches = tiny.batches(1)
    run(tuned(), [TargetMaskedKL()], batches, cache=tmp_path)
    model, methods, options = changed(name)
    autocast = options.pop("autocast", False)
    options["cache"] = {"folder": tmp_path, "dtype": options.pop("cache", "float32")}
    with pytest.raises(WrongSetup, match="keeps what the base said in another run") as caught:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            run(model, methods, batches, **options)
    lines = [line.split(":")[0].strip() for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert lines == told
    _, ran, _ = run(tuned(), [TargetMaskedKL(strength=7.0)], batches, cache=tmp_path)
    assert ran == 0  # a strength is none of them


def test_a_folder_of_its_own_for_every_setting(tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path))
    batches = tiny.batches(1)
    other, half = tiny.llama(seed=5), {"dtype": "float16"}
    for model, cache, expected, folders in (
        (None, True, 1, 1),
        (other, True, 1, 2),
        (None, half, 1, 3),
        (None, True, 0, 3),
    ):
        _, ran, _ = run(tuned(model), [TargetMaskedKL()], batches, cache=cache)
        assert (ran, len(list(tmp_path.glob("task-*")))) == (expected, folders)
    cache, ran = kept(None)
    cache.build(tiny.batches(3), CPU)
    assert (len(ran), cache.folder.parent) == (2, tmp_path)
    assert not manifest(cache.folder).whole  # other data may use it too


def test_runs_with_other_methods_share_a_folder(tmp_path):
    """Each keeps what it needs in a folder of its own, so none of them is refused, or reads what is not its."""
    batches = tiny.batches(2)
    several = [
        [TargetMaskedKL(strength=2.0)], [FullKL()], [TargetMaskedKL(positions="all")], [TargetMaskedKL(gamma=1.0)],
        [TargetMaskedKL(gamma=1.0000001)], [TargetMaskedKL(exclusion=0.97)], [TargetMaskedKL(direction="reverse")],
        [FullKL(), TargetMaskedKL()],
    ]  # fmt: skip
    lives = [run(tuned(), methods, batches)[0] for methods in several]
    for again in (False, True):
        for number, (methods, live) in enumerate(zip(several, lives, strict=True)):
            found, ran, _ = run(tuned(), methods, batches, cache=tmp_path)
            assert ran == (0 if again or number == len(several) - 1 else 2)
            assert_same(found, live, 1e-4)
    assert [kind.name for kind in contents(tmp_path, manifest(tmp_path))] == [
        "all-target", "completion-hidden", "completion-none", "completion-target", "completion-target-0.0-0.97",
        "completion-target-1.0-None", "completion-target-1.0000001-None",
    ]  # fmt: skip


def test_of_several_kinds_those_built_ahead_are_whole(tmp_path):
    batches = tiny.batches(3)
    kept(tmp_path)[0].build(batches[:2], CPU)
    assert manifest(tmp_path).whole == ("completion-target",)
    run(tuned(), [FullKL()], batches, cache=tmp_path)  # grows as it comes
    with pytest.raises(
        WrongSetup, match="2 of the 2 sequences of this batch are not in .*completion-target, which was"
    ):
        run(tuned(), [TargetMaskedKL()], batches, cache=tmp_path)
    kept(tmp_path, [FullKL()])[0].build(batches, CPU)
    assert manifest(tmp_path).whole == ("completion-none", "completion-target")


def test_every_part_of_a_key(tmp_path):
    """Another token, label or position is another sequence; in a folder that is whole it is an error that says so."""
    batch = packed(rows_of(tiny.batches(1))[:1])
    method, model = TargetMaskedKL(), tuned()
    run(model, [method], [batch], cache=tmp_path)
    token, label, place = ({name: value.clone() for name, value in batch.items()} for _ in range(3))
    token["input_ids"][0, 0] = 9 if token["input_ids"][0, 0] != 9 else 8
    label["labels"][0, -1] = -100
    place["position_ids"] += 1
    for other in (token, label, place):
        copy = tmp_path.with_name(tmp_path.name + "-copy")
        shutil.copytree(tmp_path, copy)
        found, ran, _ = run(model, [method], [other], cache=copy)
        assert ran == 1
        assert_same(found, run(model, [method], [other])[0], 1e-4)
        shutil.rmtree(copy)
    text = (tmp_path / "cache.json").read_text()
    (tmp_path / "cache.json").write_text(text.replace('"whole": []', '"whole": ["completion-target"]'))
    assert run(model, [method], [batch], cache=tmp_path)[1] == 0
    for other in (token, label, place):
        with pytest.raises(WrongSetup, match="1 of the 1 sequences of this batch are not in"):
            run(model, [method], [other], cache=tmp_path)


def test_a_shard_of_another_cache_is_refused(tmp_path):
    batches = tiny.batches(1)
    run(tuned(), [TargetMaskedKL()], batches, cache=tmp_path / "a")
    run(tuned(tiny.llama(seed=5)), [TargetMaskedKL()], batches, cache=tmp_path / "b")
    (foreign,) = (tmp_path / "b").glob("*/*.safetensors")
    shutil.copy(foreign, tmp_path / "a" / "completion-target" / "foreign.safetensors")
    with pytest.raises(WrongSetup, match=r"foreign.safetensors does not belong to this run(.|\n)*base weights"):
        run(tuned(), [TargetMaskedKL()], batches, cache=tmp_path / "a")
    run(tuned(), [FullKL()], batches, cache=tmp_path / "c")
    (foreign,) = (tmp_path / "c").glob("*/*.safetensors")
    shutil.copy(foreign, tmp_path / "a" / "completion-target" / "foreign.safetensors")
    with pytest.raises(WrongSetup, match=r"foreign.safetensors(.|\n)*kept: completion-none there, completion-target"):
        run(tuned(), [TargetMaskedKL()], batches, cache=tmp_path / "a")
    (tmp_path / "a" / "cache.json").write_text("{")
    with pytest.raises(WrongSetup, match="cannot be read"):
        run(tuned(), [TargetMaskedKL()], batches, cache=tmp_path / "a")


def test_faults_of_the_setting():
    with pytest.raises(ConfigError) as caught:
        run(tuned(), [TargetMaskedKL()], [], cache={"foldr": "x", "dtype": "bfloat16"})
    assert caught.value.faults == (
        "cache has no setting 'foldr'. Did you mean 'folder'?",
        "cache: dtype must be float32 or float16 (bfloat16 loses a small KL), got 'bfloat16'",
    )
    with pytest.raises(ConfigError, match="cache is true, a folder"):
        run(tuned(), [TargetMaskedKL()], [], cache=3)


# -- the files


def test_shards_are_plain_files_and_few_are_held_open(tmp_path, monkeypatch):
    monkeypatch.setattr(task_shards, "SHARD", 1)  # a shard for every batch
    monkeypatch.setattr(task_shards, "OPEN", 2)
    batches = tiny.batches(5)
    run(tuned(), [TargetMaskedKL()], batches, cache=tmp_path)
    files = sorted((tmp_path / "completion-target").iterdir())
    assert len(files) == 5
    with safe_open(str(files[0]), "pt") as file:
        assert set(file.keys()) == {"values", "constants", "keys", "starts"}
        assert json.loads(file.metadata()["holdfast"]) == {**manifest(tmp_path).facts, "kept": "completion-target"}
        starts = file.get_tensor("starts")
        assert len(file.get_tensor("keys")) == len(starts) - 1
        assert starts[-1] == len(file.get_tensor("values"))
    monkeypatch.setattr(task_shards, "SHARD", 2**30)
    again = [padded(rows_of(batches)[i::3]) for i in range(3)]  # each batch from several shards
    found, ran, _ = run(tuned(), [TargetMaskedKL()], again, cache=tmp_path)
    assert ran == 0
    assert_same(found, run(tuned(), [TargetMaskedKL()], again)[0], 1e-4)
    assert len(list((tmp_path / "completion-target").iterdir())) == 5


def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(task_shards, "SHARD", 1)
    batches, usage = tiny.batches(3), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    found, ran, _ = run(tuned(), [TargetMaskedKL()], [*batches, *batches], cache=tmp_path)
    assert_same(found, run(tuned(), [TargetMaskedKL()], [*batches, *batches])[0], 1e-4)
    assert ran == 3 + 2  # the first stayed in memory
    assert caplog.text.count("cannot be written") == 1
    assert not list(tmp_path.glob("*/*"))


def test_a_disk_is_not_filled_to_the_last_byte(tmp_path, monkeypatch):
    from holdfast.retain.cache_making import check_room

    usage = shutil.disk_usage(tmp_path)
    for total, left in ((10**12, 5 * 10**9), (2 * 10**10, 10**9)):  # a twentieth of a small disk
        for free, fits in ((left + 1000, True), (left + 999, False)):
            monkeypatch.setattr(shutil, "disk_usage", lambda path, t=total, f=free: usage._replace(total=t, free=f))
            if fits:
                check_room(tmp_path, 1000)
            else:
                with pytest.raises(WrongSetup, match=f"{left / 1e9:.1f} GB stay free"):
                    check_room(tmp_path, 1000)


def test_where_nothing_can_be_written_is_said_before_the_first_step(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    batches = tiny.batches(1)
    with pytest.raises(WrongSetup, match="cannot be kept in .*file/kept (.|\n)*HOLDFAST_CACHE"):
        run(tuned(), [TargetMaskedKL()], [], cache=tmp_path / "file" / "kept")
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(WrongSetup, match="cannot be kept in .*file "):
        run(tuned(), [TargetMaskedKL()], [], cache=True)
    run(tuned(), [TargetMaskedKL()], batches, cache=tmp_path / "kept")

    def denied(**_):
        raise PermissionError("Read-only file system")  # which the user of these tests may not meet

    monkeypatch.setattr(task_folder.tempfile, "TemporaryFile", denied)
    assert run(tuned(), [TargetMaskedKL()], batches, cache=tmp_path / "kept")[1] == 0
    with pytest.raises(WrongSetup, match="cannot be kept in .*new .*Read-only"):
        run(tuned(), [TargetMaskedKL()], [], cache=tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "kept"]


def test_a_loop_writes_what_has_waited_though_nothing_new_comes(tmp_path, monkeypatch):
    model, batches, now = tuned(), tiny.batches(2), time.monotonic
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with holdfast.preserve(model, optimizer, [TargetMaskedKL()], reference="base", cache=tmp_path) as session:
        for later, files in ((0, 0), (1000, 1)):
            monkeypatch.setattr(task_shards.time, "monotonic", lambda by=later: now() + by)
            for batch in batches:
                model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
                session.loss(batch)
                session.gradients_ready()
            assert len(list(tmp_path.glob("*/*.safetensors"))) == files


# -- built ahead, killed, resumed


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_task_cache_folder as t
from pathlib import Path
t.task_shards.SHARD = 1
cache, ran = t.kept(Path({folder!r}))
def batches():
    for i, batch in enumerate(t.tiny.batches(6)):
        if i == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
cache.build(batches(), t.CPU)
"""


def test_a_build_that_was_killed_goes_on(tmp_path, monkeypatch):
    here, folder = Path(__file__).parent, tmp_path / "kept"
    code = KILLED.format(tests=str(here), folder=str(folder))
    path = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    files = list(folder.glob("*/*.safetensors"))
    assert 3 <= len(files) <= 4
    assert manifest(folder).whole == ()
    left = folder / "completion-target" / f".x.safetensors.{os.uname().nodename}.999999999"
    left.write_bytes(b"half")

    cache, ran = kept(folder)
    cache.build(tiny.batches(6), CPU)
    assert len(ran) == 6 - len(files)
    assert not left.exists()
    assert manifest(folder).whole == ("completion-target",)
    (kind,) = contents(folder, manifest(folder))
    assert kind.sequences == 12
    method = TargetMaskedKL()
    found, base, _ = run(tuned(), [method], tiny.batches(6), cache=folder)
    assert base == 0
    assert_same(found, run(tuned(), [method], tiny.batches(6))[0], 1e-4)
    more = tiny.batches(1, seed=77)
    with pytest.raises(WrongSetup, match="holdfast cache build"):
        run(tuned(), [method], more, cache=folder)
    cache, ran = kept(folder)
    cache.build([*tiny.batches(6), *more], CPU)
    assert len(ran) == 1
    assert run(tuned(), [method], more, cache=folder)[1] == 0


def test_what_cannot_be_built(tmp_path):
    cache, _ = kept(tmp_path, [TargetMaskedKL(exclusion=0.5, normalise="kept")])
    with pytest.raises(NotYetSupported, match="There is nothing to build: target_masked_kl asks more"):
        cache.build(tiny.batches(1), CPU)
    cache, _ = kept(tmp_path)
    left = {name: value.flip(1) for name, value in tiny.batches(1)[0].items()}
    with pytest.raises(NotYetSupported, match="A batch cannot be kept: rows are padded on the left"):
        cache.build([left], CPU)
    cache, _ = kept(tmp_path, [TargetMaskedKL(direction="reverse")])  # it has told something else before
    beyond = {name: value.clone() for name, value in tiny.batches(1)[0].items()}
    beyond["attention_mask"][0, -2:], beyond["labels"][0, -1] = 0, 7
    with pytest.raises(NotYetSupported, match=r"cannot be kept: tokens that follow padding are supervised\. Do"):
        cache.build([beyond], CPU)
    assert not manifest(tmp_path).whole
