"""A pass of the base: no gradient, evaluation mode, supervised rows only at the head, nothing trained in it."""

import holdfast
import pytest
import torch
from holdfast.core.errors import WrongSetup
from holdfast.core.reference import AdapterOff, FrozenCopy, logits_of, probe_batch
from holdfast.core.tap import Tap
from holdfast.integrations.peft import choose_reference
from holdfast.methods import FullKL, TargetMaskedKL
from torch.utils._python_dispatch import TorchDispatchMode

import tiny


class Products(TorchDispatchMode):
    """Notes the shapes of all matrix products, and whether gradients were on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.seen.append([tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)][-2:])
        return function(*args, **(kwargs or {}))


def session_of(model, methods, **options):
    params = [p for p in model.parameters() if p.requires_grad]
    return holdfast.preserve(model, torch.optim.SGD(params, lr=0.1), methods, **options)


def test_only_supervised_rows_meet_the_head():
    """96 is the vocabulary's size, and of nothing else in this model."""
    model, batch = tiny.lora(tiny.llama()), tiny.batches(1, size=4)[0]
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    with session_of(model, [TargetMaskedKL()]) as session:
        model(**batch)
        with Products() as products:
            session.loss(batch)
    rows = [left[0] for left, right in products.seen if right == (32, 96)]
    assert rows
    assert sum(rows) == 2 * supervised  # once for each model
    assert supervised < batch["input_ids"].numel()


@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_no_module_is_walked_in_a_pass(kind, monkeypatch):
    model = tiny.lora(tiny.llama()) if kind == "lora" else tiny.llama()
    reference = choose_reference(model, None, tap := Tap(model))
    call = tap.run((), probe_batch(model))
    first = reference.hidden(tap, call)
    walks = []
    for name in ("named_modules", "modules", "named_parameters", "parameters"):
        walk = getattr(torch.nn.Module, name)
        # a layer of transformers may look at its own parameters, the model as a whole is not walked
        monkeypatch.setattr(
            torch.nn.Module, name, lambda m, *a, w=walk, **k: (walks.append(m) if m is model else None) or w(m, *a, **k)
        )
    assert torch.equal(reference.hidden(tap, call), first)
    reference.head(tap)
    assert walks == []
    list(model.modules())
    assert walks  # the counting counts


def test_an_adapter_that_is_added_after_the_first_pass_is_off_too():
    from peft import LoraConfig

    model = tiny.lora(tiny.llama(), target_modules=["v_proj"])
    reference = choose_reference(model, None, tap := Tap(model))
    batch = probe_batch(model)
    base = logits_of(reference, tap, batch)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.base_model.set_adapter(["default", "second"])
    tiny.shake(model, 0.4)
    assert (logits_of(None, tap, batch) - base).abs().max() > 1e-2
    assert torch.equal(logits_of(reference, tap, batch), base)


def weights(model, name):
    found = [p for n, p in model.named_parameters() if n.endswith(name)]
    assert found
    return found


@pytest.mark.parametrize("name", ["model.norm.weight", "layers.0.input_layernorm.weight", "embed_tokens.weight"])
def test_a_weight_that_is_trained_beside_the_adapter_is_copied(name):
    """No `modules_to_save`: the weight itself. With the adapter off it would be the student's."""
    model = tiny.lora(tiny.llama(), target_modules=["q_proj"])
    for p in weights(model, name):
        p.requires_grad_(True)
    base = logits_of(None, Tap(model), probe_batch(model))
    reference = choose_reference(model, None, Tap(model))
    assert isinstance(reference, FrozenCopy)
    tiny.shake(model)
    assert (logits_of(None, Tap(model), probe_batch(model)) - base).abs().max() > 1e-2
    assert torch.equal(logits_of(reference, Tap(model), probe_batch(model)), base)
    with pytest.raises(WrongSetup, match="begins from a trained adapter, and what was trained in place"):
        choose_reference(model, None, Tap(model))


@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_a_weight_that_is_thawed_on_the_way_is_refused(kind):
    """A reference that moves along with the student is silent, so it is not left to chance."""
    model = tiny.lora(tiny.llama()) if kind == "lora" else tiny.llama()
    late = weights(model, "model.norm.weight")[0].requires_grad_(False)
    batch = tiny.batches(1)[0]
    with session_of(model, [FullKL()]) as session:
        assert isinstance(session.reference, AdapterOff if kind == "lora" else FrozenCopy)
        model(**batch)
        session.loss(batch)
        session.gradients_ready()
        late.requires_grad_(True)
        model(**batch)
        with pytest.raises(WrongSetup, match=r"norm.weight is trained, and it (is the base's own|was frozen)"):
            session.loss(batch)


@pytest.mark.parametrize("how", ["thawed", "added"])
def test_a_part_of_the_start_that_moves_later_is_refused(how):
    """The start is with the adapter, so what of it was frozen is a part of the reference."""
    from peft import LoraConfig

    model = tiny.lora(tiny.llama())
    tiny.shake(model)
    lower = [p for name, p in model.named_parameters() if "lora" in name and "layers.0." in name]
    for p in lower:
        p.requires_grad_(False)
    reference = choose_reference(model, "start", tap := Tap(model))
    call = tap.run((), probe_batch(model))
    before = reference.hidden(tap, call)
    if how == "thawed":
        for p in lower:
            p.requires_grad_(True)
    else:
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
        assert torch.equal(reference.hidden(tap, call), before)  # it is there, and not in use
        model.base_model.set_adapter(["default", "second"])
        for p in lower:
            p.requires_grad_(False)
    with pytest.raises(WrongSetup, match=r"is trained, and it was frozen, or not there, when the reference was copied"):
        reference.hidden(tap, call)


def test_adapters_are_off_whatever_wraps_the_model():
    """FSDP changes a layer's class and wraps models; the switch reads no class, so it finds adapters all the same."""

    class Sharded(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    model = tiny.lora(tiny.llama())
    base = logits_of(None, Tap(model), probe_batch(model))
    reference = choose_reference(model, None, tap := Tap(model))
    tiny.shake(model)
    layers = model.get_base_model().model.layers
    for number, layer in enumerate(layers):
        for part in layer.modules():
            if hasattr(part, "_disable_adapters"):
                part.__class__ = type(f"FSDP{type(part).__name__}", (type(part),), {})
        layers[number] = Sharded(layer)
    assert (logits_of(None, tap, probe_batch(model)) - base).abs().max() > 1e-2
    assert torch.equal(logits_of(reference, tap, probe_batch(model)), base)
