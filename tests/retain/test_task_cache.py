"""The base is kept on the task's own sequences: the same loss as with it, nothing stale, no base the second time."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import holdfast
import pytest
import torch
from holdfast.core.errors import ConfigError, NotYetSupported, WrongSetup
from holdfast.core.reference import AdapterOff
from holdfast.core.selection import adapters_off
from holdfast.core.tap import Tap
from holdfast.methods import FullKL, SelfReplay, TargetMaskedKL
from holdfast.retain import task_folder, task_shards
from holdfast.retain.task_cache import TaskCache
from holdfast.retain.task_folder import contents, manifest
from holdfast.retain.task_kinds import Keeping
from safetensors import safe_open
from safetensors.torch import load_file

import families
import tiny
from task_runs import CPU, assert_same, packed, padded, rows_of, run, tuned

# -- the same loss

METHODS = {
    "masked": TargetMaskedKL(strength=2.0),
    "masked, everywhere": TargetMaskedKL(strength=2.0, positions="all"),
    "masked, gamma": TargetMaskedKL(gamma=1.5),
    "masked, exclusion": TargetMaskedKL(exclusion=0.97),
    "full, prompt": FullKL(strength=3.0, positions="prompt"),
    "reverse": TargetMaskedKL(direction="reverse"),
    "js": FullKL(strength=9.0, direction="js"),
}


@pytest.mark.parametrize("name", METHODS)
def test_equals_the_live_base_in_float64(name, tmp_path):
    """While it is made, and when it is read: every member of the family, by statistics or by hidden states."""
    batches, method = tiny.batches(3), METHODS[name]
    model = tuned(dtype=torch.float64)
    live, ran, _ = run(model, [method], batches)
    assert ran == 3
    made, ran, session = run(model, [method], batches, cache=tmp_path)
    assert (ran, session.logged["holdfast/cache/base_ran_for_tokens"] > 1) == (3, True)
    read, ran, session = run(model, [method], batches, cache=tmp_path)
    assert (ran, session.logged["holdfast/cache/base_ran_for_tokens"]) == (0, 0)
    for found in (made, read):
        assert_same(found, live, 1e-9)
    (kind,) = contents(tmp_path, manifest(tmp_path))
    assert kind.name.endswith("-hidden") == (name in ("reverse", "js"))
    numbers = 0 if kind.name.endswith("-hidden") else 2 if name in ("masked, gamma", "masked, exclusion") else 1
    assert f"{kind.name} {32 * 8 + 8 * numbers:,} bytes a supervised token" in session.told
    (file,) = (tmp_path / kind.name).glob("*.safetensors")
    tensors = load_file(file)
    per_token = sum(t[0].numel() * t.itemsize for n, t in tensors.items() if n in ("values", "constants", "weights"))
    assert per_token == 32 * 8 + 8 * numbers
    if name == "masked, exclusion":  # it leaves some out, so that the weights are tried
        assert 0 < (tensors["weights"] == 0).sum() < len(tensors["weights"])


@pytest.mark.parametrize(("dtype", "rtol", "size"), [("float32", 3e-4, 4), ("float16", 3e-2, 2)])
def test_float32_and_float16_against_float64(dtype, rtol, size, tmp_path):
    batches, method = tiny.batches(3), TargetMaskedKL(strength=2.0)
    exact, _, _ = run(tuned().double(), [method], batches)
    model = tuned()
    wide = [(loss.float(), gradient.float()) for loss, gradient in exact]
    for _ in range(2):
        found, _, _ = run(model, [method], batches, cache={"folder": tmp_path, "dtype": dtype})
        assert_same(found, wide, rtol)
    (file,) = tmp_path.glob("*/*.safetensors")
    assert load_file(file)["values"].itemsize == size
    errors = [((a - b).norm() / b.norm()).item() for (_, a), (_, b) in zip(found, wide, strict=True)]
    assert max(errors) > 1e-8  # the dtype does show


def test_statistics_of_a_bfloat16_model_are_in_float32(tmp_path):
    model, batches = tuned(dtype=torch.bfloat16), tiny.batches(2)
    live, _, _ = run(model, [TargetMaskedKL(strength=50.0)], batches)
    found, _, _ = run(model, [TargetMaskedKL(strength=50.0)], batches, cache=tmp_path)
    assert_same(found, live, 0.1)  # the live form rounds its products to bfloat16
    (file,) = tmp_path.glob("*/*.safetensors")
    assert load_file(file)["values"].dtype == torch.float32


@pytest.mark.parametrize("family", ["phi, head with bias", "cohere, logit scale", "gpt2"])
def test_heads_with_bias_and_scale(family, tmp_path):
    model, batches = tuned(families.build(family), dtype=torch.float64), tiny.batches(2)
    for method in (TargetMaskedKL(strength=20.0, gamma=1.0), FullKL(strength=20.0)):
        live, _, _ = run(model, [method], batches)
        for _ in range(2):
            assert_same(run(model, [method], batches, cache=tmp_path / method.name)[0], live, 1e-8)


def test_what_is_not_linear_says_so_and_keeps_hidden_states(tmp_path, caplog):
    batches = tiny.batches(2)
    capped = tuned(families.build("gemma2, soft-cap"))
    trained = tuned(modules_to_save=["lm_head"])
    for i, (model, why) in enumerate([(capped, "soft cap (3.0)"), (trained, "the head is trained")]):
        caplog.clear()
        live, _, _ = run(model, [TargetMaskedKL(strength=9.0)], batches)
        for _ in range(2):
            found, ran, session = run(model, [TargetMaskedKL(strength=9.0)], batches, cache=tmp_path / str(i))
            assert_same(found, live, 1e-4)
        assert ran == 0
        assert "completion-hidden" in session.told
        told = [record.message for record in caplog.records if "hidden states are kept" in record.message]
        assert len(told) == 2  # once a run
        assert why in told[0]


def test_what_cannot_be_kept_runs_the_base_and_says_so(tmp_path, caplog):
    kept = TargetMaskedKL(exclusion=0.5, normalise="kept")
    batches = tiny.batches(2)
    found, ran, session = run(tuned(), [kept, FullKL()], batches, cache=tmp_path)
    assert ran == 2
    assert_same(found, run(tuned(), [kept, FullKL()], batches)[0], 1e-7)
    assert "target_masked_kl asks more of the base" in caplog.text
    assert "nothing is kept of the base on the task: target_masked_kl asks more" in session.told
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    assert session.logged["holdfast/cache/base_ran_for_tokens"] == tokens / 2  # a step, on the average
    assert not list(tmp_path.iterdir())
    caplog.clear()
    run(tuned(), [SelfReplay()], batches, cache=True, retain=tiny.batches(3))
    assert "cache=True does nothing here" in caplog.text


def test_two_methods_have_an_entry_each(tmp_path):
    batches, methods = tiny.batches(3), [TargetMaskedKL(), FullKL(positions="prompt"), TargetMaskedKL(strength=0.1)]
    live, _, _ = run(tuned(), methods, batches)
    for expected in (3, 0):
        found, ran, session = run(tuned(), methods, batches, cache=tmp_path)
        assert ran == expected
        assert_same(found, live, 1e-4)
    assert {kind.name for kind in contents(tmp_path, manifest(tmp_path))} == {"completion-target", "prompt-none"}
    assert "completion-target 136 bytes a supervised token, prompt-none 136 bytes" in session.told


def test_a_share_of_the_sequences(tmp_path):
    batches, method = tiny.batches(6, size=4), TargetMaskedKL(reference_share=0.5)
    live, _, _ = run(tuned(), [method], batches)
    found, _, _ = run(tuned(), [method], batches, cache=tmp_path)
    assert_same(found, live, 1e-4)
    (kind,) = contents(tmp_path, manifest(tmp_path))
    assert kind.sequences == 12  # of 24
    again, ran, _ = run(tuned(), [method], batches, cache=tmp_path)
    assert ran == 0
    assert_same(again, live, 1e-4)


def test_a_micro_batch_of_which_no_sequence_was_drawn_is_no_news(tmp_path, caplog):
    """Where rows cannot be told apart (lengths of packed documents), one row is drawn or it is not."""
    rows, method = rows_of(tiny.batches(4)), TargetMaskedKL(reference_share=0.5)
    batches = [packed(rows[i : i + 2]) | {"cu_seq_lens_q": torch.tensor([0, 1])} for i in range(6)]
    live, expected, _ = run(tuned(), [method], batches)
    assert 0 < expected < 6
    found, ran, _ = run(tuned(), [method], batches, cache=tmp_path)
    assert ran == expected + 1  # and a document alone
    assert "not kept" not in caplog.text
    for (loss, gradient), (theirs, slow) in zip(found, live, strict=True):
        torch.testing.assert_close(loss, theirs, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradient, slow, rtol=1e-3, atol=1e-5)


def test_dropout_is_not_in_it(tmp_path):
    def model():
        return tuned(tiny.llama(attention_dropout=0.3), lora_dropout=0.3)

    run(model(), [TargetMaskedKL()], tiny.batches(2), cache=tmp_path / "dropout")
    run(tuned(), [TargetMaskedKL()], tiny.batches(2), cache=tmp_path / "none")
    with_it, without = (load_file(next((tmp_path / name).glob("*/*.safetensors"))) for name in ("dropout", "none"))
    assert torch.equal(with_it["values"], without["values"])
    assert torch.equal(with_it["constants"], without["constants"])


# -- wherever a sequence comes


def test_order_batch_size_and_padding_do_not_matter(tmp_path):
    rows, method = rows_of(tiny.batches(4)), TargetMaskedKL(strength=2.0)
    run(tuned(), [method], [padded(rows[i : i + 2]) for i in range(0, 8, 2)], cache=tmp_path)
    other = [padded([rows[i] for i in some], extra=2) for some in ([7, 0, 3], [2], [1, 6, 4, 5])]
    found, ran, _ = run(tuned(), [method], other, cache=tmp_path)
    assert ran == 0
    assert_same(found, run(tuned(), [method], other)[0], 1e-4)


def test_packed_documents_are_known_one_by_one(tmp_path):
    rows, method = rows_of(tiny.batches(4)), TargetMaskedKL(strength=2.0)
    run(tuned(), [method], [packed(rows[:5]), packed(rows[5:])], cache=tmp_path)
    other = [packed([rows[i] for i in some]) for some in ([7, 0, 3, 4], [2, 1], [6, 5])] + [padded(rows[2:4])]
    found, ran, session = run(tuned(), [method], other, cache=tmp_path)
    assert ran == 2  # to prove on the first row that they are kept apart: the row, and a document alone
    assert session.logged["holdfast/cache/base_ran_for_tokens"] == 0
    assert_same(found, run(tuned(), [method], other)[0], 1e-4)


def test_documents_that_see_each_other_are_kept_as_rows(tmp_path, caplog):
    """With a mask, transformers does not look at where positions begin anew: then neighbours are in the answer."""
    rows, method = rows_of(tiny.batches(3)), TargetMaskedKL(strength=2.0)
    first, other = packed(rows[:3], mask=True), packed([rows[1], rows[0], rows[2]], mask=True)
    live = [run(tuned(), [method], [batch])[0] for batch in (first, other)]
    run(tuned(), [method], [first], cache=tmp_path)
    assert "see each other" in caplog.text
    for batch, expected, missed in ((first, live[0], False), (other, live[1], True), (other, live[1], False)):
        found, _, session = run(tuned(), [method], [batch], cache=tmp_path)
        assert (session.logged["holdfast/cache/base_ran_for_tokens"] > 0) == missed
        assert_same(found, expected, 1e-4)


def test_other_inputs_run_the_base_and_say_so(tmp_path, caplog):
    method, batch = TargetMaskedKL(strength=2.0), tiny.batches(1)[0]
    left = {name: value.flip(1) for name, value in batch.items()}
    left["labels"] = left["labels"].masked_fill(left["attention_mask"].cumsum(1) <= 1, -100)
    assert (left["attention_mask"][:, 0] == 0).any()
    found, ran, session = run(tuned(), [method], [left], cache=tmp_path / "left")
    assert_same(found, run(tuned(), [method], [left])[0], 1e-7)
    assert ran == 1
    assert session.logged["holdfast/cache/base_ran_for_tokens"] == (left["labels"][:, 1:] != -100).sum()
    assert "rows are padded on the left" in caplog.text
    assert "rows are padded on the left" in session.told

    class Embedding(torch.nn.Module):
        """Hands its model embeddings in place of tokens."""

        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, use_cache):
            embedded = self.model.get_input_embeddings()(input_ids)
            return self.model(inputs_embeds=embedded, attention_mask=attention_mask, use_cache=use_cache)

    model = tuned()
    inside = Embedding(model.get_base_model())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with holdfast.preserve(model, optimizer, [method], reference="base", cache=tmp_path / "embedded") as session:
        inside(batch["input_ids"], batch["attention_mask"], use_cache=False)
        assert session.loss(batch) > 0
    assert "called with inputs_embeds" in caplog.text
    assert not (tmp_path / "embedded").exists()


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


def test_hidden_states_are_as_the_model_makes_them_and_so_is_what_is_said(tmp_path, caplog):
    batches, method = tiny.batches(2), TargetMaskedKL(direction="reverse")
    for name, dtype in (("bfloat16", "float32"), ("float32", "float16"), ("bfloat16", None)):
        caplog.clear()
        folder = tmp_path / f"{name} {dtype}"
        size = getattr(torch, name).itemsize
        for _ in range(2):
            cache = {"folder": folder} | ({"dtype": dtype} if dtype else {})
            _, _, session = run(tuned(dtype=getattr(torch, name)), [method], batches, cache=cache)
            assert f"completion-hidden {32 * size} bytes a supervised token" in session.told
        (file,) = folder.glob("*/*.safetensors")
        assert load_file(file)["values"].itemsize == size
        assert caplog.text.count(f"dtype={dtype} is of statistics alone") == (2 if dtype else 0)  # once a run


def test_what_float16_cannot_hold_is_kept_in_float32(tmp_path, caplog):
    model = tiny.llama()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-6)
        model.model.norm.weight.mul_(1e6)
    model, batches = tuned(model), tiny.batches(2)
    live, _, _ = run(model, [TargetMaskedKL(strength=9.0)], batches)
    for told in (1, 0):  # once a run, however many micro-batches
        caplog.clear()
        found, _, session = run(
            model, [TargetMaskedKL(strength=9.0)], batches, cache={"folder": tmp_path, "dtype": "float16"}
        )
        assert_same(found, live, 1e-3)
        assert caplog.text.count("do not fit float16") == told
        assert "completion-target 136 bytes a supervised token" in session.told
    (file,) = tmp_path.glob("*/*.safetensors")
    assert load_file(file)["values"].dtype == torch.float32


# -- built ahead, killed, resumed


def kept(folder, methods=(TargetMaskedKL(),), model=None):
    model = model or tuned()
    reference = AdapterOff(lambda: adapters_off(model))
    ran, plain = [], reference.hidden
    reference.hidden = lambda *given: ran.append(1) or plain(*given)
    return TaskCache(Tap(model), reference, methods, Keeping(folder)), ran


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_task_cache as t
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


def test_the_pieces_of_a_batch_lie_as_its_mask_does():
    """Rows of hidden[:, :-1][mask] belong to sequences in the order of `Pieces`."""
    from holdfast.core.types import Supervision
    from holdfast.retain.task_keys import Sequences, pieces

    batch = packed(rows_of(tiny.batches(2)))
    seen = Sequences(batch["input_ids"], [batch["input_ids"].shape[1]], batch["position_ids"])
    supervision = Supervision.of(batch)
    mask = supervision.mask("all")
    found = pieces(seen, mask, supervision.targets, apart=True)
    assert sum(found.counts) == mask.sum()
    places = mask[0].nonzero().flatten()
    starts = seen.starts(0)
    assert len(starts) == len(found.keys) == 4
    for i, (a, b) in enumerate(pairwise([*starts, seen.lengths[0]])):
        at = found.rows_of([i])
        assert ((places[at] >= a) & (places[at] < b)).all()
