"""A cached base gives the live base's divergence; a cache of another base, pool or setting is refused by name."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from holdfast import lab
from holdfast.core.errors import NotYetSupported, WrongSetup
from holdfast.core.reference import AdapterOff, FrozenCopy, OtherModel
from holdfast.core.retain import sequences_of
from holdfast.core.selection import adapters_off
from holdfast.core.stream import padded
from holdfast.core.tap import Tap
from holdfast.functional.divergence import Divergence
from holdfast.functional.linear_divergence import linear_divergence
from holdfast.retain.cache import ReferenceCache
from holdfast.retain.cached_reference import CachedReference

import families
import tiny

CPU = torch.device("cpu")


def tuned(model=None, dtype=torch.float32, **changes):
    """A model with a LoRA adapter that has moved, its tap, and its base."""
    model = tiny.lora((model or tiny.llama()).to(dtype), **changes)
    tiny.shake(model, size=0.05)
    return model, Tap(model), AdapterOff(lambda: adapters_off(model))


def capped(kind="gemma2, soft-cap"):
    return tuned(families.build(kind))


def pool(n=4):
    return [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in tiny.batches(n)]


def drawn(batches, numbers):
    """Some sequences of the pool in an order and a padding of their own, as a session's step draws them."""
    sequences = [ids for batch in batches for ids in sequences_of(batch)]
    return padded([sequences[number] for number in numbers], CPU)


def live_and_cached(model, tap, reference, cache, batch, divergence, **kwargs):
    """Both values, and both gradients on the adapter's parameters."""
    params = [p for p in model.parameters() if p.requires_grad]
    call = tap.run((), tap.inputs(batch))
    mask = batch["attention_mask"][:, 1:].bool()
    live = linear_divergence(
        call.hidden[:, :-1][mask],
        reference.hidden(tap, call)[:, :-1][mask],
        tap.head(),
        batch["input_ids"][:, 1:][mask],
        divergence,
        reference_head=reference.head(tap),
    )
    base = CachedReference(cache, reference.head(tap), divergence)
    cached, tokens = base.kl(call.hidden, tap.head(), cache.find(batch), mask)
    assert tokens == mask.sum()
    return [(value, torch.autograd.grad(value, params, retain_graph=True)) for value in (live, cached)]


def assert_same(pairs, rtol, atol):
    (live, live_gradients), (cached, cached_gradients) = pairs
    assert live > 5e-3
    torch.testing.assert_close(cached, live, rtol=rtol, atol=atol)
    size = torch.cat([g.flatten() for g in live_gradients]).norm()
    off = torch.cat([(a - b).flatten() for a, b in zip(live_gradients, cached_gradients, strict=True)]).norm()
    assert size > 0
    assert off <= rtol * size


# -- the same divergence


@pytest.mark.parametrize("mask", ["none", "target"])
@pytest.mark.parametrize(
    ("dtype", "kept", "rtol"),
    [(torch.float64, torch.float64, 1e-10), (torch.float32, torch.float32, 1e-4), (torch.float32, torch.float16, 5e-3)],
)
def test_equals_the_live_form_on_a_tiny_model(mask, dtype, kept, rtol, tmp_path):
    model, tap, reference = tuned(dtype=dtype)
    batches, divergence = pool(), Divergence(mask)
    cache = ReferenceCache.of(tap, reference, batches, divergence=divergence, dtype=kept, folder=tmp_path, batch_size=3)
    assert cache.divergence_mask == mask
    assert len(cache) == 8
    for numbers in ([0, 1, 2], [7, 3], [5], list(range(8))):
        pairs = live_and_cached(model, tap, reference, cache, drawn(batches, numbers), divergence)
        assert_same(pairs, rtol, atol=rtol)


def test_equals_the_live_form_on_the_lab(tmp_path):
    model, tokenizer = lab.load("lab-aligned")
    model, tap, reference = tuned(model)
    prompts = ["hello there", "what is the colour of the sky ?", "please tell me about it and more", "a b"]
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="right")
    batches = [{key: encoded[key] for key in ("input_ids", "attention_mask")}]
    assert len({int(row.sum()) for row in batches[0]["attention_mask"]}) > 2
    for divergence in (Divergence("none"), Divergence("target")):
        cache = ReferenceCache.of(tap, reference, batches, divergence=divergence, folder=tmp_path)
        for numbers in ([0, 1, 2, 3], [2, 0]):
            pairs = live_and_cached(model, tap, reference, cache, drawn(batches, numbers), divergence)
            assert_same(pairs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "divergence",
    [Divergence("none"), Divergence("target", gamma=1.0), Divergence("none", direction="js"), Divergence("target")],
    ids=str,
)
def test_a_capped_head_keeps_hidden_states_and_any_divergence(divergence, tmp_path):
    model, tap, reference = capped()
    assert tap.head().soft_cap == 3.0
    said = []
    cache = ReferenceCache.of(tap, reference, pool(), divergence=divergence, folder=tmp_path, say=said.append)
    assert cache.divergence_mask is None
    assert "hidden states of the base" in said[0]
    assert "soft cap (3.0)" in said[0]
    pairs = live_and_cached(model, tap, reference, cache, drawn(pool(), [4, 1, 6]), divergence)
    assert_same(pairs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["phi, head with bias", "cohere, logit scale", "granite, logits scaling", "gpt2"])
def test_heads_with_bias_and_scale(family, tmp_path):
    model, tap, reference = tuned(families.build(family))
    cache = ReferenceCache.of(tap, reference, pool(), folder=tmp_path)
    assert cache.divergence_mask == "none"
    pairs = live_and_cached(model, tap, reference, cache, drawn(pool(), [4, 1, 6]), Divergence("none"))
    assert_same(pairs, rtol=5e-4, atol=2e-4)  # the smallest KL here is 2e-4 a token


def test_a_trained_head_keeps_hidden_states(tmp_path):
    model, tap, reference = tuned(modules_to_save=["lm_head"])
    said = []
    cache = ReferenceCache.of(tap, reference, pool(), folder=tmp_path, say=said.append)
    assert "the head is trained" in said[0]
    pairs = live_and_cached(model, tap, reference, cache, drawn(pool(), [4, 1, 6]), Divergence("none"))
    assert_same(pairs, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotYetSupported, match=r"the head is trained.*store='auto' or 'hidden'"):
        ReferenceCache.of(tap, reference, pool(), folder=tmp_path, store="statistics")


def test_statistics_refuse_what_they_do_not_give(tmp_path):
    _, tap, reference = tuned()
    cache = ReferenceCache.of(tap, reference, pool(), folder=tmp_path)
    head = reference.head(tap)
    with pytest.raises(NotYetSupported, match="direction='reverse' needs the base's probability"):
        CachedReference(cache, head, Divergence("none", direction="reverse"))
    with pytest.raises(WrongSetup, match="mask='none', and mask='target' is asked for"):
        CachedReference(cache, head, Divergence("target"))
    moved = type(head)(head.weight.detach() * 1.01)
    with pytest.raises(WrongSetup, match="was made with another head"):
        CachedReference(cache, moved)
    base = CachedReference(cache, head)
    batch = drawn(pool(), [0])
    mask = batch["attention_mask"][:, 1:].bool()
    hidden = tap.run((), tap.inputs(batch)).hidden
    with pytest.raises(NotYetSupported, match="is not the base's"):
        base.kl(hidden, moved, [0], mask)
    copy = type(head)(head.weight.detach().clone())  # equal: a second model of the same base, say
    assert base.kl(hidden, copy, [0], mask).total == base.kl(hidden, head, [0], mask).total


# -- which base


def test_a_frozen_copy_is_the_base_it_was_copied_from(tmp_path):
    model = tiny.llama()
    for p in model.get_output_embeddings().parameters():
        p.requires_grad_(False)
    reference = FrozenCopy(model)
    tap = Tap(model)
    first = ReferenceCache.of(tap, reference, pool(), folder=tmp_path)
    tiny.shake(model, size=0.02)  # training: the base stays what it was
    again = ReferenceCache.of(tap, reference, pool(), folder=tmp_path)
    assert again.file == first.file
    assert first.divergence_mask == "none"
    pairs = live_and_cached(model, tap, reference, first, drawn(pool(), [4, 1, 6]), Divergence("none"))
    assert_same(pairs, rtol=1e-4, atol=1e-4)
    assert ReferenceCache.of(tap, FrozenCopy(model), pool(), folder=tmp_path).file != first.file


def test_another_model_as_the_base(tmp_path):
    student, base = tiny.llama(), tiny.llama()
    tiny.shake(base, size=0.02)
    student.requires_grad_(False)
    model = tiny.lora(student)
    tap, reference = Tap(model), OtherModel(base)
    said = []
    cache = ReferenceCache.of(tap, reference, pool(), folder=tmp_path, say=said.append)
    assert "the student's head is not the base's" in said[0]
    pairs = live_and_cached(model, tap, reference, cache, drawn(pool(), [4, 1, 6]), Divergence("none"))
    assert_same(pairs, rtol=1e-4, atol=1e-4)
    third = tiny.llama(seed=9)
    assert ReferenceCache.of(tap, OtherModel(third), pool(), folder=tmp_path).file != cache.file


def test_the_base_is_the_same_before_and_after_an_adapter_trains(tmp_path):
    model, tap, reference = tuned()
    first = ReferenceCache.of(tap, reference, pool(), folder=tmp_path)
    tiny.shake(model, size=0.3, seed=7)
    said = []
    again = ReferenceCache.of(tap, reference, pool(), folder=tmp_path, say=said.append)
    assert again.file == first.file
    assert "found: " in said[0]


# -- stale and foreign


def test_says_what_changed(tmp_path):
    _, tap, reference = tuned()
    cache = ReferenceCache.of(tap, reference, pool(), folder=tmp_path)

    def facts(model_tap, base, batches, **settings):
        return ReferenceCache.of(model_tap, base, batches, folder=tmp_path, **settings).facts

    _, other_tap, other = tuned(tiny.llama(seed=4))
    changes = {
        ("base weights", "head"): facts(other_tap, other, pool()),
        ("tokens",): {**cache.facts, "tokens": facts(tap, reference, [pool()[1], pool()[0], *pool()[2:]])["tokens"]},
        ("dtype",): facts(tap, reference, pool(), dtype=torch.float16),
        ("mask",): facts(tap, reference, pool(), divergence=Divergence("target")),
        ("kept", "mask"): facts(tap, reference, pool(), store="hidden"),
        ("tokens", "sequences", "positions"): facts(tap, reference, pool(3)),
    }
    for names, expected in changes.items():
        assert {name for name in cache.facts if cache.facts[name] != expected[name]} == set(names)
        with pytest.raises(WrongSetup, match="does not belong to this run") as caught:
            ReferenceCache(cache.file, expected)
        told = [line.split(":")[0].strip() for line in str(caught.value).splitlines() if line.startswith("  ")]
        assert set(told) == set(names)
    assert ReferenceCache(cache.file, cache.facts).facts == cache.facts


def test_a_changed_configuration_and_another_precision_are_another_base(tmp_path):
    model, tap, reference = tuned()
    cache = ReferenceCache.of(tap, reference, pool(), folder=tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = ReferenceCache.of(tap, reference, pool(), folder=tmp_path)
    assert (cache.facts["autocast"], low.facts["autocast"]) == ("off", "bfloat16")
    model.config.pad_token_id = 3  # hosts set it; no forward reads it
    assert ReferenceCache.of(tap, reference, pool(), folder=tmp_path).file == cache.file
    model.config.rope_theta = 500.0
    with pytest.raises(WrongSetup, match="base configuration"):
        ReferenceCache(cache.file, ReferenceCache.of(tap, reference, pool(), folder=tmp_path).facts)


def test_padding_and_batching_make_no_other_cache(tmp_path):
    _, tap, reference = tuned()
    cache = ReferenceCache.of(tap, reference, pool(), folder=tmp_path)
    apart = [drawn(pool(), [number]) for number in range(8)]
    left = [
        {"input_ids": torch.cat([torch.zeros(1, 3).long(), row["input_ids"]], 1),
         "attention_mask": torch.cat([torch.zeros(1, 3).long(), row["attention_mask"]], 1)}
        for row in apart
    ]  # fmt: skip
    for batches in (apart, left):
        assert ReferenceCache.of(tap, reference, batches, folder=tmp_path).file == cache.file


def test_sequences_are_found_by_their_tokens(tmp_path):
    _, tap, reference = tuned()
    cache = ReferenceCache.of(tap, reference, pool(), folder=tmp_path)
    assert cache.find(drawn(pool(), [6, 0, 3])) == [6, 0, 3]
    foreign = drawn(pool(), [6, 0, 3])
    foreign["input_ids"][1, 0] = 94 if foreign["input_ids"][1, 0] != 94 else 93
    with pytest.raises(WrongSetup, match=r"Rows \[1\] of the batch are not in the reference cache"):
        cache.find(foreign)
    left = {"input_ids": drawn(pool(), [2])["input_ids"], "attention_mask": drawn(pool(), [2])["attention_mask"]}
    left = {key: torch.cat([torch.zeros(1, 1).long(), value], 1) for key, value in left.items()}
    with pytest.raises(WrongSetup, match="padded on the left"):
        cache.find(left)
    mask = torch.ones(1, 40, dtype=torch.bool)
    with pytest.raises(WrongSetup, match="row 0 has positions up to 39"):
        cache.rows([0], mask)
    with pytest.raises(WrongSetup, match=r"The mask \(1 rows\) does not fit the 2 sequences"):
        cache.rows([0, 1], mask[:, :2])


def test_damaged_foreign_and_missing_files(tmp_path):
    from safetensors.torch import save_file

    _, tap, reference = tuned()
    cache = ReferenceCache.of(tap, reference, pool(), folder=tmp_path)
    whole = cache.file.read_bytes()
    (half := tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WrongSetup, match="cannot be read"):
        ReferenceCache(half)
    save_file({"values": torch.zeros(2)}, str(other := tmp_path / "other.safetensors"))
    with pytest.raises(WrongSetup, match="is no reference cache"):
        ReferenceCache(other)
    with pytest.raises(WrongSetup, match="There is no reference cache"):
        ReferenceCache(tmp_path / "none.safetensors")


# -- the file


def test_the_file_is_plain_safetensors_of_the_stated_size(tmp_path):
    from safetensors.torch import load_file

    _, tap, reference = tuned()
    said = []
    cache = ReferenceCache.of(tap, reference, pool(), folder=tmp_path, say=said.append)
    tensors = load_file(str(cache.file))
    n, s = int(cache.facts["positions"]), len(cache)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()} == {
        "values": (torch.float32, (n, 32)),
        "constants": (torch.float64, (n,)),
        "ids": (torch.int32, (n + s,)),
        "starts": (torch.int64, (s + 1,)),
    }
    assert tensors["ids"].tolist() == [i for b in pool() for ids in sequences_of(b) for i in ids.tolist()]
    size = n * (32 * 4 + 8) + 4 * (n + s) + 8 * (s + 1)
    assert size <= cache.file.stat().st_size <= size + 4096
    assert f"{size / n:,.0f} bytes a position" in said[0]
    assert [p.name for p in tmp_path.iterdir()] == [cache.file.name]


def test_the_folder_is_the_one_of_the_other_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "deep" / "folder"))
    _, tap, reference = tuned()
    assert ReferenceCache.of(tap, reference, pool()).file.parent == tmp_path / "deep" / "folder"


def test_refuses_bad_settings(tmp_path):
    _, tap, reference = tuned()
    with pytest.raises(WrongSetup, match=r"torch.bfloat16 loses the gradient of a small KL"):
        ReferenceCache.of(tap, reference, pool(), folder=tmp_path, dtype=torch.bfloat16)
    with pytest.raises(WrongSetup, match="no sequence of two tokens"):
        ReferenceCache.of(tap, reference, [], folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_room_is_said_before_the_work(monkeypatch, tmp_path):
    import shutil

    _, tap, reference = tuned()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(WrongSetup, match="The reference cache takes"):
        ReferenceCache.of(tap, reference, pool(), folder=tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_an_error_on_the_way_leaves_nothing(monkeypatch, tmp_path):
    _, tap, reference = tuned()
    ran = []

    def broken(*args):
        ran.append(1)
        if len(ran) == 3:
            raise MemoryError("on purpose")
        return AdapterOff.hidden(reference, *args)

    monkeypatch.setattr(reference, "hidden", broken)
    with pytest.raises(MemoryError, match="on purpose"):
        ReferenceCache.of(tap, reference, pool(), folder=tmp_path, batch_size=2)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_cache as t
from pathlib import Path
from holdfast.retain import cache_making
_, tap, reference = t.tuned()
plain, count = reference.hidden, []
def hidden(*args):
    count.append(1)
    if len(count) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*args)
reference.hidden = hidden
t.ReferenceCache.of(tap, reference, t.pool(), folder=Path({folder!r}), batch_size=2)
"""


def test_a_killed_writer_leaves_nothing_half(tmp_path):
    here = Path(__file__).parent
    code = KILLED.format(tests=str(here), folder=str(tmp_path))
    path = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    left = [p.name for p in tmp_path.iterdir()]
    assert len(left) == 1  # what it had begun, under a name that nobody reads
    assert left[0].startswith(".reference-")

    _, tap, reference = tuned()
    cache = ReferenceCache.of(tap, reference, pool(), folder=tmp_path)
    assert left[0].startswith(f".{cache.file.name}")
    assert [p.name for p in tmp_path.iterdir()] == [cache.file.name]  # the next writer swept up
    assert_same(
        live_and_cached(tap.model, tap, reference, cache, drawn(pool(), [1, 5]), Divergence("none")), 1e-4, 1e-4
    )


TOGETHER = """
import os, shutil, sys
sys.path.insert(0, {tests!r})
import torch.distributed as dist
import test_cache as t
from pathlib import Path
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://{folder}/rendezvous", rank=rank, world_size=2)
_, tap, reference = t.tuned()
said, folder = [], Path({folder!r})
cache = t.ReferenceCache.of(tap, reference, t.pool(), folder=folder / "cache", say=said.append)
print(len(cache), len(said), cache.file.name)
if rank == 0:
    usage = shutil.disk_usage(folder)
    shutil.disk_usage = lambda path: usage._replace(free=100)
try:
    t.ReferenceCache.of(tap, reference, t.pool(3), folder=folder / "cache")
except t.WrongSetup as error:
    print(str(error)[:35])
sys.stdout.flush()
dist.barrier()
os._exit(0)
"""


def test_of_several_processes_the_main_one_writes_and_its_failure_stops_all(tmp_path):
    code = TOGETHER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    main, other = (process.communicate(timeout=600)[0].splitlines() for process in started)
    files = [p.name for p in (tmp_path / "cache").iterdir()]
    assert main == [f"8 1 {files[0]}", "The reference cache takes 0.0 GB, a"]
    assert other == [f"8 0 {files[0]}", "There is no reference cache " + str(tmp_path)[:7]]
    assert len(files) == 1
