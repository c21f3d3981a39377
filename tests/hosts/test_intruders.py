"""Repair of trained adapters: the formula written out, PEFT's own, and everything that it must leave as it was."""

import copy

import pytest
import torch
from holdfast import lab
from holdfast.core.errors import ConfigError, WrongSetup
from holdfast.methods import repair_intruders, scale_adapter
from transformers import GPT2Config, GPT2LMHeadModel

import tiny


def student(dtype=torch.float64, base=None, **options):
    """A tiny model whose adapter is strong enough to have intruders."""
    model = tiny.lora(base or tiny.llama(), **options).to(dtype).eval()
    tiny.shake(model, 0.3)
    return model


def gpt2():
    """Its linear layers keep their weights as [in, out]."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=16, n_layer=1, n_head=2))


def layers(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def weights(model):
    """W0 and the update of every layer, as [out, in]."""
    found = {}
    for name, layer in layers(model).items():
        base, change = layer.get_base_layer().weight.detach(), layer.get_delta_weight("default").detach()
        found[name] = (base.T, change.T) if layer.fan_in_fan_out else (base, change)
    return found


def slowly(base, change, threshold=0.5, top=10):
    """The part in intruder dimensions and their number, by eigenvectors of W Wᵀ in float64."""
    base, tuned = base.double(), base.double() + change.double()
    known = [u for s, u in _left(base) if s > 0]
    new = [u for _, u in _left(tuned)[:top] if max(abs(float(u @ other)) for other in known) < threshold]
    return sum((torch.outer(u, u @ tuned) for u in new), torch.zeros_like(tuned)), len(new)


def _left(weight):
    values, vectors = torch.linalg.eigh(weight @ weight.T)
    keep = values > 1e-12 * values.max()
    return [(float(values[i]), vectors[:, i]) for i in range(len(values) - 1, -1, -1) if keep[i]]


def batch():
    return {name: value for name, value in tiny.batches(1)[0].items() if name != "labels"}


@pytest.mark.parametrize("base", [tiny.llama, gpt2])
@pytest.mark.parametrize("factor", [0.0, 0.6])
def test_the_repaired_update_is_that_of_the_formula(base, factor):
    options = {"target_modules": ["c_attn", "c_proj", "c_fc"]} if base is gpt2 else {}
    model = student(base=base(), **options)
    before = weights(model)
    slow = {name: slowly(*pair) for name, pair in before.items()}
    with repair_intruders(model, factor) as counts:
        inside = weights(model)
    assert counts == {name: count for name, (_, count) in slow.items()}
    assert sum(counts.values()) >= len(counts)
    for name, (w0, change) in before.items():
        assert torch.equal(inside[name][0], w0)
        torch.testing.assert_close(inside[name][1], change + (factor - 1) * slow[name][0], rtol=1e-8, atol=1e-8)


def test_the_forward_is_that_of_a_model_with_the_repaired_weights():
    model = student()
    twin = tiny.llama().double().eval()
    with torch.no_grad():
        for name, (w0, change) in weights(model).items():
            weight = twin.get_submodule(name.removeprefix("base_model.model.")).weight
            weight.copy_(w0 + change - 0.7 * slowly(w0, change)[0])
        plain = model(**batch()).logits
        with repair_intruders(model, 0.3):
            repaired = model(**batch()).logits
    torch.testing.assert_close(repaired, twin(**batch()).logits, rtol=1e-7, atol=1e-7)
    assert (repaired - plain).abs().max() > 0.1


def test_a_planted_direction_is_found_and_nothing_else():
    """One layer's update is along the sum of all directions of its base: like none of them."""
    model = tiny.lora(tiny.llama(), r=1, lora_alpha=1).double()
    planted = "base_model.model.model.layers.1.mlp.up_proj"
    layer = layers(model)[planted]
    u, s, _ = torch.linalg.svd(layer.base_layer.weight.detach(), full_matrices=False)
    direction = u.sum(1) / u.shape[1] ** 0.5
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.eye(1, 32))
        layer.lora_B["default"].weight.copy_(20 * s[0] * direction[:, None])
    tuned = sum(weights(model)[planted])
    strongest = torch.linalg.svd(tuned)
    for factor in (0.0, 0.5):
        with repair_intruders(model, factor, top=1) as counts:
            repaired = sum(weights(model)[planted])
        assert {name: count for name, count in counts.items() if count} == {planted: 1}
        left = strongest.U[:, 0] @ repaired @ strongest.Vh[0]
        assert left.item() == pytest.approx(factor * strongest.S[0].item(), abs=1e-9)
        others = torch.linalg.svdvals(repaired)
        torch.testing.assert_close(sorted(others)[-1], max(factor * strongest.S[0], strongest.S[1]))


@pytest.mark.parametrize("leave", ["by the end", "by an error"])
def test_afterwards_the_model_is_as_it_was_bit_for_bit(leave):
    model = student(torch.float32)
    parameters = dict(model.named_parameters())
    before = {name: (id(p), p.detach().clone(), p.requires_grad) for name, p in parameters.items()}
    with torch.no_grad():
        logits = model(**batch()).logits
        try:
            with repair_intruders(model, 0.0):
                assert not torch.equal(model(**batch()).logits, logits)
                if leave == "by an error":
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert torch.equal(model(**batch()).logits, logits)
    assert list(dict(model.named_parameters())) == list(before)
    for name, p in model.named_parameters():
        identity, value, trained = before[name]
        assert (id(p), p.requires_grad) == (identity, trained)
        assert torch.equal(p, value)


def test_inside_the_base_is_still_the_base_and_scaling_scales_the_repaired():
    model = student()
    pairs = weights(model)
    with torch.no_grad():
        with model.disable_adapter():
            base = model(**batch()).logits
        with repair_intruders(model, 0.2):
            with model.disable_adapter():
                assert torch.equal(model(**batch()).logits, base)
            with scale_adapter(model, 0.5):
                scaled = weights(model)
        with scale_adapter(model, 0.0), repair_intruders(model, 1.0):  # no update, so no intruder, and that is said
            assert torch.equal(model(**batch()).logits, base)
    for name, (w0, change) in pairs.items():
        torch.testing.assert_close(scaled[name][1], 0.5 * (change - 0.8 * slowly(w0, change)[0]), rtol=1e-8, atol=1e-8)


def test_factor_1_counts_and_changes_nothing():
    model = student(torch.float32)
    with torch.no_grad():
        logits = model(**batch()).logits
        with repair_intruders(model, 1.0) as counts:
            assert torch.equal(model(**batch()).logits, logits)
    assert sum(counts.values()) > 0


def test_pefts_own_repair_is_ours_cut_to_the_rank_of_the_adapter():
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    model = student()
    theirs = copy.deepcopy(model)
    reduce_intruder_dimension(theirs, top_k=10, threshold_epsilon=0.5, mitigation_lambda=0.4, logging_sink=None)
    with repair_intruders(model, 0.4) as counts:
        ours = {name: change for name, (_, change) in weights(model).items()}
    assert sum(counts.values()) > 0
    lost = 0.0
    for name, layer in layers(theirs).items():
        u, s, vt = torch.linalg.svd(ours[name])
        cut = u[:, :4] * s[:4] @ vt[:4]
        torch.testing.assert_close(layer.get_delta_weight("intruder_reduced"), cut, rtol=1e-6, atol=1e-6)
        lost = max(lost, float((ours[name] - cut).norm() / ours[name].norm()))
    assert lost > 0.01  # so cutting is no detail


def test_a_trained_adapter_of_the_lab():
    """Float32 on a trained model: as many intruders as float64 finds, and less of what was learned at factor 0."""
    model, tokenizer = lab.load("lab-aligned")
    torch.manual_seed(0)
    model = tiny.lora(model, r=8, lora_alpha=16)
    ids = tokenizer(["the cat sat on the red box and the dog ran home"] * 2, return_tensors="pt")
    rows = {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"], "labels": ids["input_ids"]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(20):
        loss = model(**rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    pairs = weights(model)
    with torch.no_grad():
        tuned = float(model(**rows).loss)
        with repair_intruders(model, 0.0) as counts:
            repaired, inside = float(model(**rows).loss), weights(model)
        with model.disable_adapter():
            base = float(model(**rows).loss)
    assert tuned < repaired
    assert tuned < base
    assert counts == {name: slowly(*pair)[1] for name, pair in pairs.items()}
    assert sum(counts.values()) > 0
    for name, (w0, change) in pairs.items():
        exact = change.double() - slowly(w0, change)[0]
        assert (inside[name][1] - exact).norm() <= 1e-4 * exact.norm()


def test_a_frozen_adapter_can_be_repaired_too():
    model = student()
    model.requires_grad_(False)
    with repair_intruders(model, 0.5) as counts:
        assert sum(counts.values()) > 0


def test_no_intruder_is_said():
    fresh = tiny.lora(tiny.llama())
    with pytest.warns(UserWarning, match="nothing to repair, none of 14 layers"):
        with repair_intruders(fresh, 0.5) as counts:
            assert set(counts.values()) == {0}


def refused(model, *reasons, factor=0.5):
    with pytest.raises(WrongSetup) as error, repair_intruders(model, factor):
        pass
    for reason in reasons:
        assert reason in str(error.value)


def test_what_cannot_be_repaired_is_refused():
    refused(tiny.llama(), "no active LoRA adapter")
    refused(student(use_dora=True), "dora is not plain LoRA", "14 layers")
    refused(tiny.lora(tiny.llama(), init_lora_weights="pissa"), "pissa is not plain LoRA")
    refused(student(target_modules=["embed_tokens", "q_proj"]), "embedding is not plain LoRA", "1 layers")
    quantised = student()
    for layer in layers(quantised).values():
        layer.base_layer.weight = torch.nn.Parameter(torch.ones(1, 1, dtype=torch.int8), requires_grad=False)
    refused(quantised, "quantised or sharded", "load the base unquantised")
    merged = student()
    merged.merge_adapter()
    refused(merged, "call model.unmerge_adapter() first")
    two = student()
    two.add_adapter("other", two.peft_config["default"])
    two.base_model.set_adapter(["default", "other"])
    refused(two, "2 adapters are active")
    off = student(use_dora=True)
    with off.disable_adapter():
        refused(off, "switched off", "dora")  # all reasons at once


def test_arguments_out_of_range_are_told_together():
    with pytest.raises(ConfigError) as error, repair_intruders(student(), 1.5, threshold=0.0, top=0):
        pass
    assert len(error.value.faults) == 3
    with pytest.raises(ConfigError, match="got nan"), repair_intruders(student(), float("nan")):
        pass
