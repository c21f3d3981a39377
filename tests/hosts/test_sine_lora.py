"""SineLoRA against a dense twin in float64, and through everything that PEFT does with an adapter."""

import json
import math

import holdfast
import pytest
import torch
from holdfast.core.errors import ConfigError, NeverSupported, NotYetSupported
from holdfast.core.selection import low_rank_updates, trainable
from holdfast.integrations.sine_lora import SINE_LORA, SineLinear, SineLoraConfig, sine_change
from holdfast.methods import UpdateDecay
from peft import PeftModel, get_peft_model
from torch import nn

import families
import tiny

OMEGA, RANK, ALPHA = 30.0, 4, 8


def sine(model, seed=1, shaken=True, **changes):
    torch.manual_seed(seed)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, SineLoraConfig(omega=OMEGA, **(settings | changes)))
    if shaken:
        tiny.shake(adapted)
    return adapted


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SineLinear)}


def change(layer, adapter="default", omega=OMEGA):
    """s · sin(ω · B A) / √in, entry by entry and in float64: what the paper says, without a matrix product."""
    a, b = layer.lora_A[adapter].weight.detach().double(), layer.lora_B[adapter].weight.detach().double()
    product = (b[:, :, None] * a[None, :, :]).sum(1)
    return ALPHA / RANK * torch.sin(omega * product) / math.sqrt(a.shape[1])


def twin_of(model, adapters=("default",), omegas=(OMEGA,)):
    """A plain model with W + dW as its weights."""
    twin = tiny.llama().double()
    with torch.no_grad():
        for name, layer in layers(model).items():
            weight = twin.get_submodule(name.removeprefix("base_model.model.")).weight
            weight += sum(change(layer, one, omega) for one, omega in zip(adapters, omegas, strict=True))
    return twin


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=tiny.batches(1)[0]["input_ids"]).logits


def test_it_is_the_dense_twin_and_not_lora():
    model = sine(tiny.llama().double())
    assert len(layers(model)) == 14
    ours, base = logits(model), logits(tiny.llama().double())
    assert (ours - logits(twin_of(model))).abs().max() <= 1e-12
    assert (ours - base).abs().max() > 1e-2
    for layer in layers(model).values():  # the sine bends: dW is of a rank that no product of these factors has
        assert torch.linalg.matrix_rank(layer.get_delta_weight("default")) > RANK


def test_gradients_are_those_of_the_formula():
    """With G = dL/dW of the dense twin: dL/dB = c (G ∘ cos(ω B A)) Aᵀ and dL/dA = c Bᵀ (G ∘ cos(ω B A))."""
    model, batch = sine(tiny.llama().double()).train(), tiny.batches(1)[0]
    twin = twin_of(model)
    model(**batch).loss.backward()
    twin(**batch).loss.backward()
    for name, layer in layers(model).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        c = ALPHA / RANK * OMEGA / math.sqrt(a.shape[1])
        bent = c * twin.get_submodule(name.removeprefix("base_model.model.")).weight.grad * torch.cos(OMEGA * (b @ a))
        assert (b.grad - bent @ a.T).norm() <= 1e-11 * b.grad.norm()
        assert (a.grad - b.T @ bent).norm() <= 1e-11 * a.grad.norm()
        assert b.grad.norm() > 0


def test_it_starts_as_the_base_and_switches_off_to_it_bit_for_bit():
    base = logits(tiny.llama())
    model = sine(tiny.llama(), shaken=False)
    assert torch.equal(logits(model), base)
    tiny.shake(model)
    assert not torch.equal(logits(model), base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("safe", [False, True])
def test_merged_it_is_the_same_model(safe):
    model = sine(tiny.llama().double())
    apart, base = logits(model), logits(tiny.llama().double())
    model.merge_adapter(safe_merge=safe)
    assert (logits(model) - apart).abs().max() <= 1e-12
    model.unmerge_adapter()
    with model.disable_adapter():
        assert (logits(model) - base).abs().max() <= 1e-12
    plain = model.merge_and_unload(safe_merge=safe)
    assert not layers(plain)
    assert (logits(plain) - apart).abs().max() <= 1e-12


def test_a_folder_brings_it_back_and_peft_alone_refuses_it(tmp_path, monkeypatch):
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    model = sine(tiny.llama(), lora_dropout=0.1)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["peft_type"], stored["omega"]) == (SINE_LORA, OMEGA)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert again.peft_config["default"].omega == OMEGA
    assert torch.equal(logits(again), logits(model))
    # as an unknown type, and not as the LoRA whose names its tensors have
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, SINE_LORA)
    with pytest.raises(KeyError, match=SINE_LORA):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)


def test_two_adapters_each_with_its_own_frequency():
    model = sine(tiny.llama().double())
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model.add_adapter("other", SineLoraConfig(omega=7.0, **settings))
    first = logits(model)
    model.set_adapter("other")
    tiny.shake(model, seed=6)
    assert (logits(model) - logits(twin_of(model, ["other"], [7.0]))).abs().max() <= 1e-12
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.base_model.set_adapter(["default", "other"])
    both = twin_of(model, ["default", "other"], [OMEGA, 7.0])
    assert (logits(model) - logits(both)).abs().max() <= 1e-12
    with pytest.raises(NeverSupported, match="cannot be added up"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)


def test_gpt2_keeps_its_weights_the_other_way_round():
    model = sine(families.build("gpt2").double(), fan_in_fan_out=True)
    apart = logits(model)
    assert {type(layer.base_layer).__name__ for layer in layers(model).values()} == {"Conv1D"}
    assert (apart - logits(families.build("gpt2").double())).abs().max() > 1e-3
    assert (logits(model.merge_and_unload()) - apart).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_phase_keeps_its_digits_in_low_precision(dtype):
    """ω B A is of many radians here: rounded to bfloat16 before the sine, dW would be another matrix."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) * 0.3 for shape in ((4, 64), (48, 4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = sine_change(a, b, 200.0, 2.0)
    exact = sine_change(a.double(), b.double(), 200.0, 2.0)
    careless = torch.sin(200.0 * (b @ a)).double() * 2.0 / 8.0
    assert ours.dtype == dtype
    assert (ours.double() - exact).norm() <= torch.finfo(dtype).eps * exact.norm()
    assert (careless - exact).norm() > 10 * (ours.double() - exact).norm()


def test_no_dense_matrix_waits_for_the_backward():
    model = sine(tiny.llama()).train()
    own = {p.data_ptr() for p in model.parameters()}
    dense = {tuple(layer.base_layer.weight.shape) for layer in layers(model).values()}
    dense |= {shape[::-1] for shape in dense}
    kept = []

    def pack(tensor):
        if tuple(tensor.shape) in dense and tensor.data_ptr() not in own:
            kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**tiny.batches(1, size=3, length=11)[0]).loss
        assert kept == []
        loss.backward()


class Quantised(nn.Linear):
    """As bitsandbytes has it: a linear layer of torch's by class, with a weight of another kind."""


@pytest.mark.parametrize("kind", ["quantised", "embedding"])
def test_layers_that_it_cannot_merge_into_are_refused(kind):
    model, target = tiny.llama(), "q_proj"
    if kind == "quantised":
        model.model.layers[0].self_attn.q_proj = Quantised(32, 32, bias=False)
    else:
        target = "embed_tokens"
    with pytest.raises(NotYetSupported, match=rf"SineLoRA on (Quantised|Embedding) \(model.*{target}\)"):
        sine(model, target_modules=[target])


def test_settings_that_do_not_go_with_it_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        SineLoraConfig(omega=0, init_lora_weights="pissa", use_dora=True, lora_bias=True)
    assert len(caught.value.faults) == 4
    told = "\n".join(caught.value.faults)
    for part in ("omega must be a positive number, got 0", "got 'pissa'", "use_dora forms dW", "lora_bias forms dW"):
        assert part in told


def test_methods_on_updates_know_that_it_is_not_lora():
    model = sine(tiny.llama())
    params = trainable(model)
    assert {update.variant for update in low_rank_updates(model, params)} == {"sine_lora"}
    with holdfast.preserve(model, torch.optim.SGD(params.values(), lr=0.1), [UpdateDecay()]) as session:
        model(**tiny.batches(1)[0]).loss.backward()
        with pytest.raises(NeverSupported, match="update_decay on sine_lora"):
            session.gradients_ready()
