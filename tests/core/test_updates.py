"""Which weight updates a model forms, what makes one no s · B · A, and what methods on them get from the session."""

import json
from dataclasses import dataclass

import holdfast
import peft
import pytest
import torch
from holdfast.core import checkpoint
from holdfast.core.fisher import Fishers
from holdfast.core.gradients import Gradients
from holdfast.core.layers import DenseUpdate
from holdfast.core.method import WeightMethod
from holdfast.core.reference import FrozenCopy
from holdfast.core.selection import adapters_off, layer_updates, low_rank_updates, trainable
from holdfast.core.session import Session
from holdfast.core.tap import Tap
from holdfast.core.types import FisherSpec
from holdfast.functional.packed_fishers import pack, unpack

import families
import tiny


def updates_of(model, *select):
    return layer_updates(model, trainable(model, select or ("*",)))


def one_variant(model):
    (variant,) = {update.variant for update in updates_of(model)}
    return variant


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("", {}),
        ("", {"use_rslora": True}),
        ("", {"init_lora_weights": "gaussian"}),
        ("", {"init_lora_weights": "orthogonal"}),
        ("", {"init_lora_weights": "mica"}),
        ("", {"init_lora_weights": False}),
        ("", {"velora_config": peft.VeloraConfig(num_groups=4)}),
        ("dora", {"use_dora": True}),
        ("pissa", {"init_lora_weights": "pissa"}),
        ("pissa", {"init_lora_weights": "pissa_niter_4"}),
        ("olora", {"init_lora_weights": "olora"}),
        ("kasa", {"kasa_config": peft.KasaConfig()}),
        ("alora", {"alora_invocation_tokens": [7, 8]}),
        ("monteclora", {"monteclora_config": peft.MontecloraConfig()}),
    ],
)
def test_variants_are_told_by_name(variant, settings):
    assert one_variant(tiny.lora(tiny.llama(), **settings)) == variant


@pytest.mark.parametrize("start", ["corda", "lora_ga", "loftq"])
def test_initialisations_that_need_data_or_bits_are_told_by_their_configuration(start):
    model = tiny.lora(tiny.llama())
    model.peft_config["default"].init_lora_weights = start
    assert one_variant(model) == start


def test_other_adapters_and_layers_are_told_by_name():
    adalora = peft.AdaLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", total_step=10)
    assert one_variant(peft.get_peft_model(tiny.llama(), adalora)) == "adalora"
    assert one_variant(tiny.lora(tiny.llama(), target_modules=["embed_tokens"])) == "embedding"
    experts = families.build("mixtral, mixture of experts")
    model = tiny.lora(experts, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    assert one_variant(model) == "target_parameters"
    conv = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    assert one_variant(peft.get_peft_model(conv, peft.LoraConfig(target_modules=["0"]))) == "conv2d"


def test_low_rank_updates_are_those_of_the_selected_factors():
    model = tiny.lora(tiny.llama())
    tiny.shake(model)
    chosen = updates_of(model, "*layers.0*q_proj.lora_B*")
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    assert [(u.name, u.layer) for u in chosen] == [(f"{layer}.default", layer)]
    change = chosen[0].change({})
    torch.testing.assert_close(change.left @ change.right, chosen[0].dense())


def test_dense_updates_are_of_linear_layers_alone():
    model = tiny.llama()
    found = updates_of(model)
    assert all(isinstance(update, DenseUpdate) for update in found)
    assert {u.layer for u in found} == {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert [(u.name, u.layer) for u in updates_of(model, "lm_head*")] == [("lm_head.weight", "lm_head")]
    (head,) = updates_of(model, "lm_head*")
    start = {head.name: head.weight.detach().clone()}
    tiny.shake(model)
    torch.testing.assert_close(head.change(start).delta, head.weight - start[head.name])


def test_a_transposed_weight_gives_an_update_that_is_out_by_in():
    model = families.build("gpt2")
    update = next(u for u in updates_of(model) if u.layer.endswith("c_attn"))
    start = {update.name: update.weight.detach().clone()}
    tiny.shake(model)
    change = update.change(start)
    assert change.shape == (96, 32)
    torch.testing.assert_close(change.delta, update.weight.T - start[update.name].T)


def test_copies_that_peft_trains_go_by_their_place_in_the_model():
    model = tiny.lora(tiny.llama(), target_modules=["q_proj"], modules_to_save=["lm_head", "mlp"])
    dense = [update for update in updates_of(model) if isinstance(update, DenseUpdate)]
    assert len(low_rank_updates(model, trainable(model))) == 2
    assert {u.layer.removeprefix("base_model.model.") for u in dense} == {
        "lm_head",
        *(f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")),
    }
    names = dict(model.named_parameters())
    assert all(names[update.name] is update.weight for update in dense)


def test_adapters_are_off_inside_the_context_and_back_after_a_failure():
    model = tiny.lora(tiny.llama())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    seen = []
    layer.base_layer.register_forward_hook(lambda *_: seen.append(layer.disable_adapters))
    with pytest.raises(IndexError), adapters_off(model):
        model(torch.tensor([[1000]]))  # no such token
    with adapters_off(model):
        model(torch.tensor([[5]]))
    assert seen == [True]
    assert not layer.disable_adapters


@dataclass(frozen=True, kw_only=True)
class Probe(WeightMethod):
    """A quadratic penalty on dW in a Fisher, which tells what it was given."""

    name = "probe"
    uses_retain = True
    data: tuple[str, ...] = ()

    def init(self, setup):
        tensors = {}
        for name, fisher in setup.fishers(self.data, FisherSpec(keep=4)).items():
            tensors |= pack(fisher, f"{name}/")
        return tensors

    def penalty(self, state, weights):
        weights.log("number", float(weights.number))
        fisher = unpack(state, "retain/")
        return self.strength * sum(fisher[u.layer].quadratic(u.change({})) for u in weights.updates)


def run(methods, steps=1, model=None):
    model = model or tiny.lora(tiny.llama())
    tiny.shake(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    logged = []
    with holdfast.preserve(model, optimizer, methods, retain=tiny.batches(3)) as session:
        for _ in range(steps):
            model(**tiny.batches(1)[0]).loss.backward()
            plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
            session.gradients_ready()
            logged.append(session.pop_metrics())
            added = {n: p.grad - plain[n] for n, p in model.named_parameters() if p.requires_grad}
            optimizer.zero_grad()
    return session, logged, plain, added


def norm(tensors):
    return torch.stack([t.square().sum() for t in tensors.values()]).sum().sqrt().item()


def test_a_penalty_knows_its_step_and_its_share_of_the_gradient_is_logged_every_tenth():
    _, logged, plain, added = run([Probe(strength=0.1)], steps=11)
    assert [metrics["holdfast/probe/number"] for metrics in logged] == list(range(11))
    shown = [step for step, metrics in enumerate(logged) if "holdfast/probe/gradient_ratio" in metrics]
    assert shown == [0, 10]
    assert logged[10]["holdfast/probe/gradient_ratio"] == pytest.approx(norm(added) / norm(plain), rel=1e-4)


def test_the_ratio_of_a_second_method_is_to_the_gradient_before_all_penalties():
    _, alone, *_ = run([Probe(strength=0.1)])
    _, both, *_ = run([Probe(strength=5.0), Probe(strength=0.1)])
    key = "holdfast/probe{}/gradient_ratio"
    assert both[0][key.format(".2")] == pytest.approx(alone[0][key.format("")], rel=1e-4)
    assert both[0][key.format("")] == pytest.approx(50 * alone[0][key.format("")], rel=1e-4)


def test_methods_with_the_same_fisher_hold_and_store_it_once(tmp_path):
    session, *_ = run([Probe(), Probe(strength=2.0)])
    first, second = session._states
    large = [key for key in first if "factor/" in key]
    assert all(first[key] is second[key] for key in large)
    session.save(tmp_path)
    again = Session(session.model, session.methods, retain=tiny.batches(3), tap=session.tap)
    again.load(tmp_path)
    assert all(again._states[0][key] is again._states[1][key] for key in large)
    for ours, theirs in zip(again._states, session._states, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert json.loads((tmp_path / checkpoint.RECORD).read_text())["on_host"] == []


def test_views_of_one_memory_are_written_apart_and_old_records_are_read(tmp_path):
    whole = torch.arange(6.0)
    tensors = {"a": whole, "b": whole, "c": whole[:3], "d": torch.zeros(0), "e": torch.zeros(0)}
    checkpoint.write(tmp_path, tensors, {"methods": []})
    found, record = checkpoint.read(tmp_path, [])
    assert record["shared"] == [{"b": "a"}]
    assert found["b"] is found["a"]
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    del record["shared"]
    (tmp_path / checkpoint.RECORD).write_text(json.dumps(record))
    assert set(checkpoint.read(tmp_path, [])[0]) == {"a", "c", "d", "e"}


def test_the_base_of_another_reference_is_not_remembered(tmp_path):
    model = tiny.lora(tiny.llama())
    tiny.shake(model)
    tap = Tap(model)
    gradients = Gradients(model, tap, FrozenCopy(model))
    pairs = {
        "input_ids": torch.randint(5, 95, (4, 8), generator=torch.Generator().manual_seed(0)),
        "attention_mask": torch.ones(4, 8, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]] * 4),
    }
    gradients(trainable(model), [[pairs]], "preference", 0.1)
    ((batch, _),) = gradients._of_base.values()
    assert batch is pairs  # held, so that its id stays its own
    gradients.forget()
    assert not gradients._of_base


def test_a_session_without_retain_data_has_no_fishers():
    session = Session(tiny.lora(tiny.llama()), [])
    assert isinstance(session._fishers, Fishers)
    with pytest.raises(holdfast.core.errors.WrongSetup, match="needs retain data"):
        session._fishers([], (), FisherSpec(), 0)
