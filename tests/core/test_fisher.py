"""Collected Fishers against slow loops in float64, and what a collection must leave alone."""

import warnings

import pytest
import torch
from holdfast.core import packing
from holdfast.core.errors import NotYetSupported, WrongSetup
from holdfast.core.fisher import Fishers, unseen
from holdfast.core.retain import Retain
from holdfast.core.selection import adapters_off, layer_updates, trainable
from holdfast.core.tap import Tap
from holdfast.core.types import FisherSpec
from holdfast.functional.lowrank import Dense
from torch.nn.functional import cross_entropy

import families
import tiny

MODELS = {
    "lora": lambda: tiny.lora(tiny.llama()),
    "rslora": lambda: tiny.lora(tiny.llama(), use_rslora=True),
    "dora": lambda: tiny.lora(tiny.llama(), use_dora=True),
    "dense": tiny.llama,
    "dense, tied and capped": lambda: families.build("gemma2, soft-cap"),
    "copies": lambda: tiny.lora(tiny.llama(), target_modules=["q_proj"], modules_to_save=["lm_head", "mlp"]),
    "gpt2": lambda: tiny.lora(families.build("gpt2"), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "gpt2, dense": lambda: families.build("gpt2"),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path))
    return tmp_path


def make(kind):
    """A float64 model whose adapter has moved."""
    model = MODELS[kind]().double()
    if hasattr(model, "peft_config"):
        tiny.shake(model)
    return model.eval()


def collector(model, data=None, seed=0):
    return Fishers(model, Tap(model), Retain(tiny.batches(3, size=3) if data is None else data), seed, unseen)


def collect(model, spec=FisherSpec(), data=None, seed=0):
    found = collector(model, data, seed)(layer_updates(model, trainable(model)), (), spec, 0)
    return found["retain"]


def matrix(factor):
    """S, [d, d]."""
    if factor.vectors is None:
        return factor.values.diag()
    return factor.times(torch.eye(factor.size, dtype=torch.float64))


def normalised(moments):
    return moments / moments.trace() * len(moments)


def slow(model):
    """x, δ and the gradient of every example at every layer, from one unpadded forward and backward each.

    The loss is not the model's own, which is in float32 whatever the weights are.
    """
    layers = {u.layer: u for u in layer_updates(model, trainable(model))}
    seen = {name: [] for name in layers}
    for batch in tiny.batches(3, size=3):
        for row, real in enumerate(batch["attention_mask"].sum(1).tolist()):
            example = {k: v[row : row + 1, :real] for k, v in batch.items()}
            calls: dict[str, tuple] = {}
            with adapters_off(model), torch.enable_grad():
                modules = {name: inner(model, name) for name in layers}
                hooks = [m.register_forward_hook(noting(calls, name)) for name, m in modules.items()]
                flags = {p: p.requires_grad for p in model.parameters()}
                for p in model.parameters():
                    p.requires_grad_(True)
                logits = model(example["input_ids"], attention_mask=example["attention_mask"]).logits[0, :-1]
                loss = cross_entropy(logits, example["labels"][0, 1:], reduction="sum")
                deltas = torch.autograd.grad(loss, [out for _, out in calls.values()], retain_graph=True)
                weights = torch.autograd.grad(loss, [modules[name].weight for name in calls])
                for p, flag in flags.items():
                    p.requires_grad_(flag)
            for hook in hooks:
                hook.remove()
            for name, delta, weight in zip(calls, deltas, weights, strict=True):
                gradient = weight.T if type(modules[name]).__name__ == "Conv1D" else weight
                seen[name].append((calls[name][0].detach()[0], delta[0], gradient))
    return seen


def noting(calls, name):
    return lambda module, args, output: calls.update({name: (args[0], output)})


def inner(model, name):
    module = model.get_submodule(name)
    module = getattr(module, "original_module", module)
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def apart(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "dense", "copies", "gpt2", "gpt2, dense"])
def test_kronecker_factors_equal_those_of_a_slow_loop(kind):
    model = make(kind)
    expected = slow(model)
    fisher, diagonal = collect(model, FisherSpec(keep=96)), collect(model, FisherSpec("diagonal"))
    assert fisher.keys() == diagonal.keys() == expected.keys()
    for name, examples in expected.items():
        if name.endswith("lm_head"):
            continue  # runs on response tokens alone: below
        x, delta = (torch.cat([example[i] for example in examples]) for i in (0, 1))
        assert apart(matrix(fisher[name].into), normalised(x.T @ x)) < 1e-10
        assert apart(matrix(fisher[name].out), normalised(delta.T @ delta)) < 1e-10
        assert apart(diagonal[name].into.values, normalised((x.T @ x).diag().diag()).diag()) < 1e-10
        assert apart(diagonal[name].out.values, normalised((delta.T @ delta).diag().diag()).diag()) < 1e-10


def test_the_head_is_read_where_responses_are_predicted():
    model = make("dense")
    fisher, batch = collect(model, FisherSpec(keep=96))["lm_head"], tiny.batches(3, size=3)
    hidden = [model.model(b["input_ids"], b["attention_mask"])[0][:, :-1][b["labels"][:, 1:] != -100] for b in batch]
    x = torch.cat(hidden).detach()
    assert apart(matrix(fisher.into), normalised(x.T @ x)) < 1e-10


@pytest.mark.parametrize("kind", MODELS)
def test_sample_quadratic_is_the_mean_square_of_dense_gradients(kind):
    model = make(kind)
    expected, fisher = slow(model), collect(model, FisherSpec("samples"))
    generator = torch.Generator().manual_seed(0)
    for name, examples in expected.items():
        gradients = torch.stack([example[2] for example in examples])
        if name.endswith("lm_head") and model.get_input_embeddings().weight is model.get_output_embeddings().weight:
            continue  # the gradient of a tied weight is the embeddings' too
        delta = torch.randn(gradients.shape[1:], generator=generator, dtype=torch.float64)
        products = (gradients * delta).sum((1, 2))
        mean = gradients.square().mean(0).mean()
        torch.testing.assert_close(
            fisher[name].quadratic(Dense(delta)), products.square().mean() / mean, rtol=1e-8, atol=0
        )


def test_layers_with_the_same_input_share_its_factor():
    fisher = collect(make("lora"))
    layer = "base_model.model.model.layers.1"
    q, k, v, o = (fisher[f"{layer}.self_attn.{name}_proj"] for name in "qkvo")
    assert q.into is k.into is v.into
    assert o.into is not q.into
    assert fisher[f"{layer}.mlp.gate_proj"].into is fisher[f"{layer}.mlp.up_proj"].into
    assert fisher["base_model.model.model.layers.0.self_attn.q_proj"].into is not q.into


def rows_of(batches):
    return [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(len(b["input_ids"]))]


@pytest.mark.parametrize("labels", ["data", "model"])
@pytest.mark.parametrize("kind", ["kronecker", "samples"])
def test_padding_and_batches_change_nothing(kind, labels, monkeypatch):
    model, data = make("lora"), tiny.batches(3, size=3)
    spec = FisherSpec(kind, labels, keep=96)
    fisher = collect(model, spec, data)
    wide = [{k: torch.nn.functional.pad(v, (0, 5), value=-100 * (k == "labels")) for k, v in b.items()} for b in data]
    left = [{k: torch.nn.functional.pad(v, (5, 0), value=-100 * (k == "labels")) for k, v in b.items()} for b in data]
    # Llama's rotations are in float32, and padding on the left shifts them
    for other, bar in ((rows_of(data), 1e-9), (wide, 1e-9), (left, 1e-6)):
        for tokens in (2048, 12):
            monkeypatch.setattr(packing, "TOKENS", tokens)
            found = collect(model, spec, other)
            for name, ours in fisher.items():
                if kind == "samples":
                    delta = torch.ones(ours.left.shape[2], ours.right.shape[2], dtype=torch.float64)
                    ratio = found[name].quadratic(Dense(delta)) / ours.quadratic(Dense(delta))
                    assert abs(ratio - 1) < 10 * bar
                else:
                    assert apart(matrix(found[name].out), matrix(ours.out)) < bar
                    assert apart(matrix(found[name].into), matrix(ours.into)) < bar


def test_labels_drawn_from_the_model():
    model, spec, layer = make("lora"), FisherSpec(labels="model"), "base_model.model.model.layers.0.mlp.up_proj"
    drawn, again = collect(model, spec)[layer], collector(model)(layer_updates(model, trainable(model)), (), spec, 0)
    assert torch.equal(drawn.out.values, again["retain"][layer].out.values)
    other_seed, data = collect(model, spec, seed=1)[layer], collect(model)[layer]
    assert apart(drawn.out.values, data.out.values) > 1e-3
    assert apart(drawn.out.values, other_seed.out.values) > 1e-3
    assert torch.equal(drawn.into.values, data.into.values)  # what enters does not depend on labels


def test_only_the_first_rows_and_only_the_chosen_answers():
    model, data = make("lora"), tiny.batches(3, size=3)
    layer = "base_model.model.model.layers.0.mlp.up_proj"
    four = collect(model, FisherSpec(rows=4), data)[layer]
    assert torch.equal(four.out.values, collect(model, FisherSpec(), rows_of(data)[:4])[layer].out.values)
    pairs = [
        {
            "input_ids": torch.cat([b["input_ids"], b["input_ids"].flip(0)]),
            "attention_mask": torch.cat([b["attention_mask"], b["attention_mask"].flip(0)]),
            "completion_mask": torch.cat([b["labels"] != -100, b["labels"].flip(0) != -100]),
        }
        for b in data
    ]
    chosen = collect(model, FisherSpec(), pairs)[layer]
    assert torch.equal(chosen.out.values, collect(model, FisherSpec(), data)[layer].out.values)


def test_nothing_is_left_behind():
    """Gradients, flags, hooks and the random-number state; dropout is off although the model trains."""
    quiet = collect(make("lora"))
    model = tiny.lora(tiny.llama(attention_dropout=0.5)).double()
    tiny.shake(model)
    model.train()
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    torch.manual_seed(3)
    before, rng = flags(model), torch.get_rng_state()
    found = collect(model, FisherSpec(labels="model"))
    assert torch.equal(rng, torch.get_rng_state())
    assert flags(model) == before
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.requires_grad)
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding))
    layer = "base_model.model.model.layers.0.mlp.up_proj"
    assert torch.equal(found[layer].into.values, quiet[layer].into.values)


def flags(model):
    modules = [(m.training, getattr(m, "_disable_adapters", None)) for m in model.modules()]
    return modules, [(p.requires_grad, p.grad is None) for p in model.parameters()]


def test_gradient_checkpointing_changes_nothing(own_cache):
    model = make("lora")
    fisher = collect(model)
    next(own_cache.iterdir()).unlink()
    model.gradient_checkpointing_enable()
    model.train()
    for name, found in collect(model).items():
        assert torch.equal(found.out.values, fisher[name].out.values)


class Forwards:
    """Counts the forwards of a model."""

    def __init__(self, model):
        self.count = 0
        model.register_forward_pre_hook(self._count)

    def _count(self, *_):
        self.count += 1


def test_a_fisher_is_read_from_the_disk_where_nothing_changed(own_cache):
    model = make("lora")
    forwards = Forwards(model.base_model.model.model)
    fisher = collect(model)
    assert forwards.count == 1
    tiny.shake(model)  # adapters do not count
    found = collect(model)
    assert forwards.count == 1
    for name, theirs in fisher.items():
        ours = found[name]
        for a, b in ((ours.out, theirs.out), (ours.into, theirs.into)):
            assert torch.equal(a.vectors, b.vectors)
            assert torch.equal(a.values, b.values)
            assert torch.equal(a.rest, b.rest)
    assert len(list(own_cache.iterdir())) == 1

    def missed(**changes):
        count = forwards.count
        collect(model, **changes)
        return forwards.count == count + 1

    assert missed(spec=FisherSpec(keep=3))
    assert missed(spec=FisherSpec(labels="model"))
    assert missed(spec=FisherSpec(labels="model"), seed=1)
    assert missed(data=tiny.batches(2, size=3))
    assert not missed(seed=1)  # no label is drawn
    with torch.no_grad():
        model.base_model.model.model.norm.weight[0] += 1e-6
    assert missed()


def test_a_damaged_file_is_collected_anew_and_an_unwritable_folder_costs_a_warning(own_cache, monkeypatch):
    model = make("lora")
    fisher = collect(model)
    file = next(own_cache.iterdir())
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.warns(UserWarning, match="cannot be read"):
        again = collect(model)
    layer = next(iter(fisher))
    assert torch.equal(again[layer].out.values, fisher[layer].out.values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect(model)  # the file is whole again
    (own_cache / "file").touch()
    monkeypatch.setenv("HOLDFAST_CACHE", str(own_cache / "file"))
    with pytest.warns(UserWarning, match="cannot be written"):
        collect(model)


def test_methods_share_one_pass():
    model = make("lora")
    forwards = Forwards(model.base_model.model.model)
    fishers = collector(model, {"text": tiny.batches(1), "refusals": tiny.batches(1, seed=8)})
    updates = layer_updates(model, trainable(model))
    both = fishers(updates, (), FisherSpec(), 0)
    one = fishers(updates, ("refusals",), FisherSpec(), 7)
    assert list(both) == ["text", "refusals"]
    assert list(one) == ["refusals"]
    assert one["refusals"] is both["refusals"]
    assert forwards.count == 2
    with pytest.raises(WrongSetup, match="no retain set 'safety': the sets are 'text', 'refusals'"):
        fishers(updates, ("safety",), FisherSpec(), 0)


def test_dense_layers_are_asked_again_after_they_moved():
    model = make("dense")
    fishers, updates = collector(model), layer_updates(model, trainable(model))
    start = fishers(updates, (), FisherSpec(), 0)["retain"]
    assert fishers(updates, (), FisherSpec(), 0)["retain"] is start
    tiny.shake(model)
    assert not torch.equal(
        fishers(updates, (), FisherSpec(), 5)["retain"]["lm_head"].into.values, start["lm_head"].into.values
    )


def test_what_has_no_fisher_is_refused_by_name():
    embedding = tiny.lora(tiny.llama(), target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(NotYetSupported, match=r"embed_tokens.default adapts a Embedding"):
        collect(embedding)
    experts = tiny.lora(
        families.build("mixtral, mixture of experts"),
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.down_proj"],
    )
    with pytest.raises(NotYetSupported, match=r"experts.default adapts a MixtralExperts"):
        collect(experts)
    merged = tiny.lora(tiny.llama())
    merged.merge_adapter()
    with pytest.raises(WrongSetup, match="merged"):
        collect(merged)
    with pytest.raises(WrongSetup, match="needs retain data"):
        collect(tiny.lora(tiny.llama()), data=[])


def test_progress_is_told_what_is_done():
    model, told = make("lora"), []

    def progress(iterable, description):
        told.append((description, len(list(iterable))))
        return iterable

    Fishers(model, Tap(model), Retain(tiny.batches(3)), 0, progress)(
        layer_updates(model, trainable(model)), (), FisherSpec(), 0
    )
    assert told == [("Fisher of retain", 1)]
