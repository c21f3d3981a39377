"""Of which base an answer is, and to which call: adapters in the reference, RoPE, precision, packing."""

import holdfast
import pytest
import torch
from holdfast.core.errors import NotYetSupported, WrongSetup
from holdfast.core.reference import AdapterOff, FrozenCopy, OtherModel
from holdfast.core.selection import adapters_off
from holdfast.core.tap import Tap
from holdfast.methods import FullKL, SelfReplay, TargetMaskedKL
from holdfast.retain.cache import ReferenceCache
from holdfast.retain.cache_facts import of_base
from holdfast.retain.task_folder import manifest
from peft import LoraConfig

import tiny
from task_runs import CPU, assert_same, kept, packed, padded, rows_of, run, tuned


def adapted(seed):
    """A model whose adapter is its own."""
    model = tiny.lora(tiny.llama())
    tiny.shake(model, seed=seed)
    return model


def on_top(seed, scale=1.0):
    """A model with an earlier adapter that acts and is frozen, and a new one that is trained."""
    model = adapted(seed)
    torch.manual_seed(5)
    model.add_adapter("new", LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "new"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= scale
    return model.train()


def with_other_model(seed):
    return tuned(), {"reference": adapted(seed)}


def with_start(seed):
    return on_top(seed), {"reference": "start", "moved": 3}


def with_scale(scale):
    return on_top(21, scale), {"reference": "start", "moved": 3}


# -- which base


@pytest.mark.parametrize(
    ("make", "one", "other"), [(with_other_model, 11, 12), (with_start, 21, 22), (with_scale, 1.0, 0.5)]
)
@pytest.mark.parametrize("stream", ["task", "retain"])
def test_an_adapter_inside_the_reference_is_part_of_the_base(make, one, other, stream, tmp_path, monkeypatch):
    """Its weights and its scale: with others nothing is read that the first run kept, of the task or of a pool."""
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path))
    batches, more, kept = tiny.batches(2), {"cache": True}, "task-*"
    live, cached = TargetMaskedKL(strength=2.0), TargetMaskedKL(strength=2.0)
    if stream == "retain":
        more, kept = {"retain": tiny.batches(3, seed=8)}, "reference-*"
        live, cached = SelfReplay(cache=False), SelfReplay()
    values = []
    for which in (one, other, one):
        found = []
        for method, options in ((live, {**more, "cache": False}), (cached, more)):
            model, its = make(which)
            found.append(run(model, [method], batches, **its, **options)[0])
        assert_same(found[1], found[0], 1e-4)
        values.append(found[1][0][0].item())
    assert values[0] == values[2] != pytest.approx(values[1], rel=1e-2)
    assert len(list(tmp_path.glob(kept))) == 2


def test_what_no_forward_of_the_base_sees_is_no_part_of_it():
    """Where adapters are off theirs do not matter; a model trained whole starts from the base that an adapter has."""
    model, facts = tuned(), {}
    for name, reference in (("off", AdapterOff(lambda: adapters_off(model))), ("start", FrozenCopy(model))):
        facts[name] = of_base(Tap(model), reference)
    tiny.shake(model)
    assert of_base(Tap(model), AdapterOff(lambda: adapters_off(model))) == facts["off"]
    whole = tiny.llama()
    assert of_base(Tap(whole), FrozenCopy(whole)) == facts["off"]
    assert of_base(Tap(model), OtherModel(tiny.llama())) == facts["off"]
    assert facts["off"]["adapters"] == "none"
    assert {name for name in facts["off"] if facts["off"][name] != facts["start"][name]} == {"base weights", "adapters"}


def test_which_adapter_acts_is_part_of_the_base():
    student, reference = Tap(tuned()), OtherModel(on_top(21))
    both = of_base(student, reference)
    reference.model.set_adapter("default")
    one = of_base(student, reference)
    with reference.model.disable_adapter():
        none = of_base(student, reference)
    assert len({facts["adapters"] for facts in (both, one, none)}) == 3
    for facts in (one, none):
        assert {name for name in facts if facts[name] != both[name]} == {"adapters"}


def test_the_start_with_an_adapter_as_the_base(tmp_path):
    """The frozen copy is the base however far the student has moved."""
    batches, method = tiny.batches(3), TargetMaskedKL(strength=2.0)
    for moved, expected in ((3, 3), (4, 0)):
        options = {"reference": "start", "moved": moved}
        live, _, _ = run(on_top(21), [method], batches, **options)
        found, ran, _ = run(on_top(21), [method], batches, **options, cache=tmp_path)
        assert ran == expected
        assert_same(found, live, 1e-4)


def test_another_model_as_the_base_even_one_of_another_width(tmp_path):
    batches, method = tiny.batches(2), TargetMaskedKL(strength=2.0)
    other = tiny.llama(seed=4, hidden_size=48)
    live, _, _ = run(tuned(), [method], batches, reference=other)
    for expected in (2, 0):
        found, ran, session = run(tuned(), [method], batches, reference=other, cache=tmp_path)
        assert ran == expected
        assert_same(found, live, 1e-4)
    assert f"completion-hidden {48 * 4} bytes a supervised token" in session.told


# -- RoPE that follows the longest row of a batch

LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0, "rope_theta": 1e4,
    "original_max_position_embeddings": 8,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}


def row(length, seed):
    ids = torch.randint(5, 95, (length,), generator=torch.Generator().manual_seed(seed))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.index_fill(0, torch.arange(min(2, length)), -100),
    }


def of_rope(parameters):
    model = tiny.llama(rope_parameters=dict(parameters), max_position_embeddings=8)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "self_attn" in name:
                weight.mul_(4)  # so that positions matter
    return tuned(model)


def test_longrope_is_known_by_how_long_the_batch_is(tmp_path):
    """A short row beside a long one is another sequence: the model gives it other frequencies."""
    short, long, method = row(7, 1), row(20, 2), TargetMaskedKL(strength=2.0)
    together, alone, wide = padded([short, long]), padded([short]), padded([short], extra=4)
    live = {id(b): run(of_rope(LONG), [method], [b])[0] for b in (together, alone, wide)}
    assert live[id(alone)][0][0] != pytest.approx(live[id(wide)][0][0].item(), rel=1e-3)  # padding alone does it
    for batch, expected in ((together, 1), (alone, 1), (wide, 0), (together, 0), (alone, 0)):
        found, ran, _ = run(of_rope(LONG), [method], [batch], cache=tmp_path)
        assert ran == expected  # what the long batch kept serves the one that is as wide
        assert_same(found, live[id(batch)], 1e-4)


def test_longrope_packed_and_built_ahead(tmp_path):
    rows, method = [row(7, 1), row(20, 2), row(6, 3)], TargetMaskedKL(strength=2.0)
    for batch, expected in ((packed(rows), 1), (packed(rows[::-1]), 1), (packed(rows), 0), (packed(rows[::2]), 2)):
        live, _, _ = run(of_rope(LONG), [method], [batch])
        found, ran, _ = run(of_rope(LONG), [method], [batch], cache=tmp_path)
        assert ran == expected  # the last has no long document: they are tried apart
        assert_same(found, live, 1e-4)
    cache, _ = kept(tmp_path / "built", [method], of_rope(LONG))
    cache.build([padded(rows)], CPU)
    assert manifest(tmp_path / "built").whole == ()  # other batches need something else
    run(of_rope(LONG), [method], [padded(rows[:1])], cache=tmp_path / "built")


def test_dynamic_rope_is_not_kept_where_it_grows(tmp_path, caplog):
    method, long, short = TargetMaskedKL(strength=2.0), padded([row(7, 1), row(20, 2)]), padded([row(7, 1)])
    full = padded([row(8, 3)])  # as long as the model was made for: how it is answered depends on what came before
    batches = [long, full, short, long, short, full]
    live, _, _ = run(of_rope(DYNAMIC), [method], batches)
    found, ran, _ = run(of_rope(DYNAMIC), [method], batches, cache=tmp_path)
    assert_same(found, live, 1e-4)
    assert ran == 5  # the short one is read the second time
    assert "reaches 8 positions, where dynamic RoPE begins" in caplog.text
    cache, _ = kept(tmp_path / "built", [method], of_rope(DYNAMIC))
    with pytest.raises(NotYetSupported, match="A batch cannot be kept: its longest row reaches 8 positions"):
        cache.build([short, long], CPU)


@pytest.mark.parametrize("rope", [LONG, DYNAMIC])
def test_a_pool_of_long_sequences_is_not_kept_either(rope, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path))
    batches, pools = tiny.batches(2), ([padded([row(7, 1), row(20, 2)])], [padded([row(7, 1), row(6, 2)])])
    for pool, files in zip(pools, (0, 1), strict=True):
        live, _, _ = run(of_rope(rope), [SelfReplay(cache=False)], batches, retain=pool)
        found, _, _ = run(of_rope(rope), [SelfReplay()], batches, retain=pool)
        assert_same(found, live, 1e-4)
        assert len(list(tmp_path.glob("reference-*"))) == files
        assert caplog.text.count("RoPE changes with the longest sequence") == 1
    model = of_rope(rope)
    with pytest.raises(NotYetSupported, match="RoPE changes .* these are of up to 20 tokens"):
        ReferenceCache.of(Tap(model), AdapterOff(lambda: adapters_off(model)), pools[0])


# -- how it is called


def test_another_precision_on_the_way_is_an_error(tmp_path):
    model, (first, second) = tuned(), tiny.batches(2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with holdfast.preserve(model, optimizer, [TargetMaskedKL()], reference="base", cache=tmp_path) as session:
        for batch, on in ((first, False), (second, True)):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
                model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
            if on:
                with pytest.raises(WrongSetup, match="with autocast bfloat16, and before with autocast off"):
                    session.loss(batch)
            else:
                session.loss(batch)
                session.gradients_ready()
    assert manifest(tmp_path).facts["autocast"] == "off"


def test_documents_are_tried_apart_for_every_way_of_calling(tmp_path, caplog):
    """With a mask they see each other, without it they do not: what the first batch shows is not true of the next."""
    rows, method = rows_of(tiny.batches(4)), TargetMaskedKL(strength=2.0)
    batches = [packed(rows[:3]), packed(rows[3:6], mask=True), packed([rows[5], rows[4], rows[3]], mask=True)]
    for way in (batches, batches[::-1]):
        live, _, _ = run(tuned(), [method], way)
        found, _, session = run(tuned(), [method], way, cache=tmp_path)
        assert_same(found, live, 1e-4)
        assert "see each other" in session.told
    assert caplog.text.count("see each other") == 2  # once a run
    one = packed(rows[:2])
    two = {name: value.repeat(2, 1) for name, value in one.items()}
    _, ran, _ = run(tuned(), [method], [one, two], cache=tmp_path / "rows")
    assert ran == 4  # each with a document alone: what holds of one row need not hold of two
    masked = packed(rows[:2], mask=True)
    wider = {"input_ids": 0, "position_ids": 0, "attention_mask": 0, "labels": -100}
    wider = {name: torch.nn.functional.pad(masked[name], (0, 3), value=fill) for name, fill in wider.items()}
    _, ran, session = run(tuned(), [method], [masked, wider], cache=tmp_path / "padding")
    assert ran == 4  # nor what holds of a mask of ones of one that leaves something out, though the row is the same
    assert session.logged["holdfast/cache/base_ran_for_tokens"] == (masked["labels"][:, 1:] != -100).sum() / 2


@pytest.mark.parametrize("before", [1, 2])
def test_a_long_document_shows_its_neighbours_at_its_beginning(before, tmp_path):
    """On the whole of it they are lost in the rounding of 16 bits, and a neighbour of one token is one, too."""
    rows, method = [row(before, 1), row(1200, 2)], TargetMaskedKL(strength=2.0)
    first = packed(rows, mask=True)
    other = packed([row(before, 3), rows[1]], mask=True)
    for batch in (first, other):
        model = tuned(tiny.llama(max_position_embeddings=2048))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, _, session = run(model, [method], [batch], cache=tmp_path)
        assert session.logged["holdfast/cache/base_ran_for_tokens"] > 1000  # neither takes the other's
        assert "see each other" in session.told


def test_two_kinds_are_each_of_their_own_base(tmp_path):
    """Two methods, a base of another head: hidden states for both, one entry."""
    batches, methods = tiny.batches(2), [TargetMaskedKL(), FullKL()]
    other = tiny.llama(seed=4)
    live, _, _ = run(tuned(), methods, batches, reference=other)
    for expected in (2, 0):
        found, ran, _ = run(tuned(), methods, batches, reference=other, cache=tmp_path)
        assert ran == expected
        assert_same(found, live, 1e-4)
