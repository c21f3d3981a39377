"""What was found in a model's modules once is searched again after every change of them, and only then."""

import copy
import gc
import weakref

import pytest
import torch
from holdfast.core.module_tree import ModuleTree, all_modules
from holdfast.core.selection import adapter_layers, adapters_off
from holdfast.core.tap import evaluation
from peft import LoraConfig
from torch import nn

import tiny


def add_adapter(model):
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))


def replace_layer(model):
    model.get_base_model().model.layers[1] = copy.deepcopy(model.get_base_model().model.layers[0])


def replace_weight(model):
    norm = model.get_base_model().model.norm
    norm.weight = nn.Parameter(norm.weight.detach().clone())


def delete_adapter(model):
    model.delete_adapter("default")


def append_layer(model):
    model.get_base_model().model.layers.append(nn.Linear(2, 2))


@pytest.mark.parametrize("change", [add_adapter, replace_layer, replace_weight, delete_adapter, append_layer])
def test_every_change_is_seen(change):
    model = tiny.lora(tiny.llama())
    tree = ModuleTree(model)
    before = tree.find(all_modules)
    assert tree.find(all_modules) is before
    assert tree.look() == 1
    change(model)
    assert tree.look() == 2
    assert tree.find(all_modules) is not before
    assert [id(module) for module in tree.modules()] == [id(module) for module in model.modules()]
    assert tree.find(adapter_layers) == adapter_layers(model)
    assert tree.look() == 2


def test_what_training_does_is_no_change():
    model = tiny.lora(tiny.llama())
    tree = ModuleTree(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**tiny.batches(1)[0]).loss.backward()
    optimizer.step()
    model.eval()
    model.load_state_dict(model.state_dict())
    model.to(torch.float64)
    assert tree.look() == 1


def test_modes_and_adapters_are_as_they_were():
    model = tiny.lora(tiny.llama())
    model.train()
    model.get_base_model().model.layers[0].eval()
    tree, plain = ModuleTree(model), [module.training for module in model.modules()]
    with evaluation(tree), adapters_off(model, tree.find(adapter_layers)):
        assert not any(module.training for module in model.modules())
        assert all(layer.disable_adapters for layer in adapter_layers(model))
    assert [module.training for module in model.modules()] == plain
    assert True in plain
    assert False in plain
    assert not any(layer.disable_adapters for layer in adapter_layers(model))


def test_a_tree_keeps_no_model_alive():
    model = tiny.llama()
    tree, alive = ModuleTree(model), weakref.ref(model)
    tree.modules()
    model.tree = tree  # even in a ring
    del model, tree
    gc.collect()
    assert alive() is None
