"""The base is kept on the task's own sequences: the same loss as with it, nothing stale, no base the second time."""

import json
import os
import shutil
import signal
import subprocess
import sys
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
from holdfast.retain import task_shards
from holdfast.retain.task_cache import TaskCache
from holdfast.retain.task_folder import contents, manifest
from holdfast.retain.task_kinds import Keeping
from safetensors import safe_open
from safetensors.torch import load_file

import families
import tiny

CPU = ("cpu", torch.bfloat16, False)


def tuned(model=None, dtype=torch.float32, **changes):
    """A model whose adapter has moved."""
    model = tiny.lora((model or tiny.llama()).to(dtype), **changes)
    tiny.shake(model, size=0.05)
    return model.train()


def run(model, methods, batches, **options):
    """The loss and the gradient of every batch, how often the base ran, and the session's last words."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer, ran, found = torch.optim.SGD(params, lr=0.0), [], []
    settings = {"reference": "base", "share_prefix": False, **options}
    with holdfast.preserve(model, optimizer, methods, **settings) as session:
        plain = session.reference.hidden
        session.reference.hidden = lambda *given: ran.append(1) or plain(*given)
        for batch in batches:
            torch.manual_seed(0)  # of dropout
            model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
            loss = session.loss(batch)
            gradients = torch.autograd.grad(loss, params, allow_unused=True)
            found.append((loss.detach(), torch.cat([g.flatten() for g in gradients if g is not None])))
            session.gradients_ready()
        session.told, session.logged = session.explain(), session.pop_metrics()
    return found, len(ran), session


def assert_same(ours, theirs, rtol):
    assert len(ours) == len(theirs)
    for (loss, gradient), (expected, slow) in zip(ours, theirs, strict=True):
        assert expected > 1e-3
        assert loss.item() == pytest.approx(expected.item(), rel=rtol, abs=rtol)
        assert (gradient - slow).norm() <= rtol * slow.norm()


def rows_of(batches):
    """The rows of batches without their padding."""
    found = []
    for batch in batches:
        for row, real in enumerate(batch["attention_mask"].bool()):
            found.append({name: value[row][real] for name, value in batch.items()})
    return found


def padded(rows, extra=0):
    """A batch of rows, padded on the right and by so many columns more."""
    width = max(len(row["input_ids"]) for row in rows) + extra
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.stack([torch.nn.functional.pad(r[name], (0, width - len(r[name])), value=value) for r in rows])
        for name, value in fill.items()
    }


def packed(rows, *, mask=False):
    """A batch of one row that holds documents one after another."""
    ids, labels = (torch.cat([row[name] for row in rows])[None] for name in ("input_ids", "labels"))
    at = torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None]
    labels = labels.masked_fill(at == 0, -100)
    batch = {"input_ids": ids, "labels": labels, "position_ids": at}
    return batch | ({"attention_mask": torch.ones_like(ids)} if mask else {})


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
    found, ran, _ = run(tuned(), [method], [left], cache=tmp_path / "left")
    assert_same(found, run(tuned(), [method], [left])[0], 1e-7)
    assert ran == 1
    assert "rows are padded on the left" in caplog.text

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
    elif name == "mask":
        methods = [FullKL()]
    elif name == "positions":
        methods = [TargetMaskedKL(positions="all")]
    elif name == "gamma":
        methods = [TargetMaskedKL(gamma=1.0)]
    elif name == "direction":
        methods = [TargetMaskedKL(direction="reverse")]
    elif name == "another method beside it":
        methods.append(FullKL())
    return model, methods, options


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("base weights", ["base weights"]), ("base configuration", ["base configuration"]),
        ("head", ["base weights", "head"]), ("tokenizer", ["tokenizer"]), ("dtype", ["dtype"]),
        ("autocast", ["autocast"]), ("mask", ["kept"]), ("positions", ["kept"]), ("gamma", ["kept"]),
        ("direction", ["kept"]), ("another method beside it", ["kept"]),
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
    for methods, expected, folders in (([TargetMaskedKL()], 1, 1), ([FullKL()], 1, 2), ([TargetMaskedKL()], 0, 2)):
        _, ran, _ = run(tuned(), methods, batches, cache=True)
        assert (ran, len(list(tmp_path.glob("task-*")))) == (expected, folders)
    cache, ran = kept(None)
    list(cache.build(tiny.batches(3), CPU))
    assert (len(ran), cache.folder.parent) == (2, tmp_path)
    assert not manifest(cache.folder).whole  # other data may use it too


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
    (tmp_path / "cache.json").write_text(text.replace('"whole": false', '"whole": true'))
    assert run(model, [method], [batch], cache=tmp_path)[1] == 0
    for other, why in (
        (token, "1 with tokens that are not there"),
        (label, "1 with tokens that are there, but with other labels"),
        (place, "1 with tokens that are there, but with other labels or position ids"),
    ):
        with pytest.raises(WrongSetup, match=f"1 of the 1 sequences of this batch are not in .*{why}"):
            run(model, [method], [other], cache=tmp_path)


def test_a_shard_of_another_cache_is_refused(tmp_path):
    batches = tiny.batches(1)
    run(tuned(), [TargetMaskedKL()], batches, cache=tmp_path / "a")
    run(tuned(tiny.llama(seed=5)), [TargetMaskedKL()], batches, cache=tmp_path / "b")
    (foreign,) = (tmp_path / "b").glob("*/*.safetensors")
    shutil.copy(foreign, tmp_path / "a" / "completion-target" / "foreign.safetensors")
    with pytest.raises(WrongSetup, match=r"foreign.safetensors does not belong to this run(.|\n)*base weights"):
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
        assert set(file.keys()) == {"values", "constants", "keys", "tokens", "starts"}
        assert json.loads(file.metadata()["holdfast"]) == manifest(tmp_path).facts
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


def test_what_float16_cannot_hold_is_kept_in_float32(tmp_path, caplog):
    model = tiny.llama()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-6)
        model.model.norm.weight.mul_(1e6)
    model, batches = tuned(model), tiny.batches(2)
    live, _, _ = run(model, [TargetMaskedKL(strength=9.0)], batches)
    for _ in range(2):
        found, _, _ = run(
            model, [TargetMaskedKL(strength=9.0)], batches, cache={"folder": tmp_path, "dtype": "float16"}
        )
        assert_same(found, live, 1e-3)
    assert "do not fit float16" in caplog.text
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
list(cache.build(batches(), t.CPU))
"""


def test_a_build_that_was_killed_goes_on(tmp_path, monkeypatch):
    here, folder = Path(__file__).parent, tmp_path / "kept"
    code = KILLED.format(tests=str(here), folder=str(folder))
    path = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    files = list(folder.glob("*/*.safetensors"))
    assert 3 <= len(files) <= 4
    assert not manifest(folder).whole
    left = folder / "completion-target" / f".x.safetensors.{os.uname().nodename}.999999999"
    left.write_bytes(b"half")

    cache, ran = kept(folder)
    assert list(cache.build(tiny.batches(6), CPU)) == [2] * 6
    assert len(ran) == 6 - len(files)
    assert not left.exists()
    assert manifest(folder).whole
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
    list(cache.build([*tiny.batches(6), *more], CPU))
    assert len(ran) == 1
    assert run(tuned(), [method], more, cache=folder)[1] == 0


def test_what_cannot_be_built(tmp_path):
    cache, _ = kept(tmp_path, [TargetMaskedKL(exclusion=0.5, normalise="kept")])
    with pytest.raises(NotYetSupported, match="There is nothing to build: target_masked_kl asks more"):
        list(cache.build(tiny.batches(1), CPU))
    cache, _ = kept(tmp_path)
    left = {name: value.flip(1) for name, value in tiny.batches(1)[0].items()}
    with pytest.raises(NotYetSupported, match="A batch cannot be kept: rows are padded on the left"):
        list(cache.build([left], CPU))
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
