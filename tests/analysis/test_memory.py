"""What the arithmetic says of memory is what a real run allocates: states to the byte, activations nearly."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from holdfast import methods
from holdfast.analysis import memory, memory_states
from holdfast.analysis.memory import Decoder, Part, peak, total
from holdfast.core.tap import language_model
from holdfast.functional.divergence import Divergence
from holdfast.functional.head import Head
from holdfast.functional.linear_divergence import linear_divergence
from holdfast.integrations.plain_loop import preserve
from holdfast.integrations.retain_data import to_sets
from holdfast.recipe.memory import activations, host_parts
from holdfast.recipe.memory_facts import Facts
from holdfast.recipe.memory_methods import added
from holdfast.recipe.memory_retain import cache_size
from holdfast.recipe.memory_state import state_size
from holdfast.recipe.model import ModelSpec
from holdfast.recipe.skeleton import of_config
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import tiny

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def retain(sets: int = 2, rows: int = 12) -> dict[str, list]:
    """Sets of text in batches of 4, as a host makes them."""
    given = {f"set{n}": tiny.texts(rows, seed=n) for n in range(sets)}
    return to_sets(given, tiny.tokenizer())


def facts(model, spec: ModelSpec, **more) -> Facts:
    """The facts of a model of which nothing is used but its configuration."""
    return Facts(of_config(model.config, spec), **{"batch": 2, "length": 10, "on_cpu": True, **more})


def pair(dense: bool = False, dtype: str = "float32", **changes):
    """A real tiny model, and the skeleton's facts of the same."""
    base = tiny.llama().to(getattr(torch, dtype))
    if dense:
        return base, ModelSpec("tiny", dtype=dtype)
    adapter = LORA | changes
    return tiny.lora(base, **changes), ModelSpec("tiny", "LORA", adapter, dtype)


def started(model, method, sets):
    """A session that has made its states, with the methods it acts with."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tiny gradients are noise, and say so
        with preserve(model, optimizer, method, retain=sets, tokenizer=tiny.tokenizer()) as session:
            session.begin()
            return session


# --- states, to the byte -------------------------------------------------------------------------------------------

STATES = {
    "l2_sp": methods.L2SP(),
    "l2_sp, selected": methods.L2SP(select=("*lora_B*",)),
    "update_decay": methods.UpdateDecay(),
    "ewc": methods.EWC(rows=8),
    "kronecker": methods.FisherAlignment(rows=8, keep=8),
    "kronecker, all kept": methods.FisherAlignment(rows=8),
    "kronecker, selected": methods.FisherAlignment(rows=8, keep=8, select=("*q_proj*", "*v_proj*", "*down_proj*")),
    "one set": methods.FisherAlignment(rows=8, keep=8, data="set0"),
    "rotated": methods.FisherAlignment(rows=8, keep=8, rotated=True),
    "compared": methods.FisherAlignment(rows=8, keep=8, data="set0", compare="set1"),
    "samples": methods.FisherAlignment(rows=6, keep=8, kind="samples"),
    "samples, few": methods.FisherAlignment(rows=100, keep=8, kind="samples"),
    "task": methods.TaskStability(rows=8, keep=8, most=8, data="set0", metric="task", task="set1"),
    "overlap": methods.RiemannianOverlap(rows=8, keep=8, most=8),
    "fishers": methods.GeodesicSeparation(rows=8, keep=8, most=8, data="set0", against="set1"),
    "complement": methods.GeodesicSeparation(rows=8, keep=8, most=8, form="complement"),
    "orthogonal_lora": methods.OrthogonalLoRA(rows=8, keep=8, directions=3),
    "agem": methods.AGEM(),
    "pcgrad": methods.PCGrad(),
    "random_subspace": methods.RandomSubspace(rank=5),
    "random_subspace, layers": methods.RandomSubspace(rank=5, scope="layer"),
    "projection": methods.OrthogonalProjection(rank=4, samples=8),
    "projection, more than there are rows": methods.OrthogonalProjection(rank=32, samples=8),
    "projection, means": methods.OrthogonalProjection(rank=None, samples=8),
    "projection, one each": methods.OrthogonalProjection(rank=2, samples=8),
    "projection, bfloat16": methods.OrthogonalProjection(rank=4, samples=8, storage="bfloat16"),
    "projection, tensors": methods.OrthogonalProjection(rank=4, samples=8, scope="tensor"),
    "projection, rolling": methods.OrthogonalProjection(rank=4, samples=8, rolling=0.5),
    "projection, leak": methods.OrthogonalProjection(rank=4, samples=8, apply_to="gradient", leak=0.1),
    "projection, repair": methods.OrthogonalProjection(rank=4, samples=8, repair=0.1),
    "projection, auto": methods.OrthogonalProjection(rank=4, samples=8, refresh_every="auto"),
    "projection, selected": methods.OrthogonalProjection(rank=4, samples=8, select=("*lora_A*",)),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_is_as_large_as_was_said(name):
    model, spec = pair()
    sets = retain()
    session = started(model, [STATES[name]], sets)
    said = state_size(STATES[name], facts(model.get_base_model(), spec, retain=sets))
    assert said == bytes_of(session._states[0].values())
    assert (said > 0) == (name != "update_decay")


@pytest.mark.parametrize("name", ["l2_sp", "update_decay", "kronecker", "ewc", "projection", "agem"])
def test_so_it_is_where_all_weights_are_trained(name):
    model, spec = pair(dense=True)
    sets = retain()
    session = started(model, [STATES[name]], sets)
    said = state_size(STATES[name], facts(model, spec, retain=sets))
    assert said == bytes_of(session._states[0].values()) > 0


@pytest.mark.parametrize("name", ["l2_sp", "update_decay", "kronecker", "agem"])
def test_and_where_a_copy_of_the_head_is_trained_beside_the_adapter(name):
    model, spec = pair(modules_to_save=["lm_head"])
    sets = retain()
    session = started(model, [STATES[name]], sets)
    known = facts(model.get_base_model(), spec, retain=sets)
    assert state_size(STATES[name], known) == bytes_of(session._states[0].values()) > 0


def test_a_fisher_that_methods_share_is_held_once():
    model, spec = pair()
    sets = retain()
    both = [methods.FisherAlignment(rows=8, keep=8), methods.RiemannianOverlap(rows=8, keep=8, most=8)]
    session = started(model, both, sets)
    held = {t.untyped_storage().data_ptr(): t for state in session._states for t in state.values()}
    known = facts(model.get_base_model(), spec, retain=sets)
    said = [part for part in added(both, known) if part.when == "held" and part.name != "retain batches"]
    assert sum(part.size for part in said) == bytes_of(held.values())
    assert [part.of for part in said if part.name.startswith("Fisher")] == ["fisher_alignment"]
    assert total(added(both[:1], known), "held") < total(added(both, known), "held")  # which factor is whose


def test_what_the_session_keeps_of_a_fisher_that_is_in_no_state_is_counted():
    model, spec = pair()
    sets = retain()
    method = methods.OrthogonalLoRA(rows=8, keep=8, directions=3)
    session = started(model, [method], sets)
    kept = []
    for fisher in session._fishers._known.values():
        for layer in fisher.values():
            for factor in (layer.out, layer.into):
                kept += [factor.vectors, factor.values, factor.rest]
    distinct = {t.untyped_storage().data_ptr(): t for t in kept}
    parts = added([method], facts(model.get_base_model(), spec, retain=sets))
    (fisher,) = [part for part in parts if part.name.startswith("Fisher")]
    assert fisher.size == bytes_of(distinct.values())


def test_retain_batches_are_counted_as_they_lie_in_memory():
    sets = retain()
    model, spec = pair()
    session = started(model, [methods.AGEM()], sets)
    parts = added([methods.AGEM()], facts(model.get_base_model(), spec, retain=sets))
    (part,) = [part for part in parts if part.name == "retain batches"]
    assert part.size == bytes_of(t for batches in session.retain.sets.values() for b in batches for t in b.values())
    assert part.exact


def test_the_flat_buffers_of_an_optimizer_step_are_as_large_as_was_said():
    model, spec = pair()
    method = methods.RandomSubspace(rank=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with preserve(model, optimizer, [method]) as session:
        model(**tiny.batches(1)[0]).loss.backward()
        session.gradients_ready()
        transforms = session._transforms
        transforms._before_step()
        update = transforms._update(0)
        done = method.transform(transforms._states[0], transforms._step(0, update)).direction
        made = [*transforms._before.values(), *update.values(), *done.values()]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in made}
    parts = added([method], facts(model.get_base_model(), spec))
    (buffers,) = [part for part in parts if part.name == "flat buffers"]
    assert sum(held.values()) == buffers.size == total(parts, "update")
    assert buffers.exact


def test_the_copy_before_a_step_is_of_all_that_any_method_selects():
    model, spec = pair()
    both = [methods.RandomSubspace(rank=2, select=("*lora_A*",)), methods.AGEM(select=("*q_proj*",))]
    known = facts(model.get_base_model(), spec)
    sizes = {name: 4 * p.numel() for name, p in known.trained.items()}
    of_a, of_q = (sum(size for name, size in sizes.items() if part in name) for part in ("lora_A", "q_proj"))
    union = sum(size for name, size in sizes.items() if "lora_A" in name or "q_proj" in name)
    (buffers,) = [part for part in added(both, known) if part.name == "flat buffers"]
    assert buffers.size == union + max(of_a, of_q)


# --- the host, the reference, the cache ----------------------------------------------------------------------------


@pytest.mark.parametrize(("dense", "dtype"), [(False, "float32"), (False, "bfloat16"), (True, "float32")])
def test_weights_adapter_gradients_and_adam_are_as_large_as_was_said(dense, dtype):
    model, spec = pair(dense, dtype)
    bare = model if dense else model.get_base_model()
    said = {part.name: part for part in host_parts(facts(bare, spec))}
    trained = [p for p in model.parameters() if p.requires_grad]
    whole = bytes_of(model.parameters())
    assert said["base weights"].size + (0 if dense else said["adapter"].size) == whole
    assert said["base weights"].size == bytes_of(tiny.llama().to(getattr(torch, dtype)).parameters())
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = [t for each in optimizer.state.values() for t in each.values()]
    assert said["gradients"].size == bytes_of(p.grad for p in trained)
    assert said["optimizer (adamw_torch)"].size == bytes_of(state)


def test_a_frozen_copy_is_as_large_as_was_said():
    model, spec = pair(init_lora_weights="pissa")
    with preserve(model, torch.optim.AdamW(model.parameters()), [methods.FullKL()]) as session:
        held = bytes_of(session.reference.state().values())
    parts = added([methods.FullKL()], facts(model.get_base_model(), spec, reference="copy"))
    assert total(parts, "held") == held > 0


@pytest.mark.parametrize("method", [methods.SelfReplay(), methods.SelfReplay(direction="reverse")])
def test_the_cache_of_the_base_is_as_large_as_was_said(method, tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path))
    model, spec = pair()
    sets = retain(sets=1)
    batch = tiny.batches(1)[0]
    with preserve(model, torch.optim.AdamW(model.parameters()), [method], retain=sets) as session:
        model(**batch)
        session.loss(batch)
    (file,) = tmp_path.glob("reference-*.safetensors")
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert cache_size(method, facts(model.get_base_model(), spec, retain=sets)) == file.stat().st_size - header


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_task_is_kept_in_is_as_large_as_was_said(dtype, tmp_path):
    """Statistics in the cache's dtype, hidden states in the model's; and nothing where a method asks for more."""
    asked = {
        "completion-target": methods.TargetMaskedKL(),
        "completion-target-0.5-None": methods.TargetMaskedKL(gamma=0.5),
        "completion-hidden": methods.TargetMaskedKL(direction="reverse"),
    }
    model, spec = pair(dtype=dtype)
    batch = tiny.batches(1)[0]
    cache = {"folder": tmp_path, "dtype": "float16"}
    with preserve(model, torch.optim.AdamW(model.parameters()), list(asked.values()), cache=cache) as session:
        model(**batch)
        session.loss(batch)
    known = facts(model.get_base_model(), spec, kept=2, rows=1)
    parts = [part for part in added(list(asked.values()), known) if part.when == "disk"]
    for (name, method), part in zip(asked.items(), parts, strict=True):
        (file,) = (tmp_path / name).glob("*.safetensors")
        tensors = load_file(file)
        rows = [tensors[key] for key in ("values", "constants", "weights") if key in tensors]
        assert part.size / known.length == bytes_of(rows) / len(rows[0])
        assert part.of == method.name
    more = methods.TargetMaskedKL(exclusion=1e-4, normalise="kept")
    assert not [part for part in added([*asked.values(), more], known) if part.when == "disk"]


# --- estimates -----------------------------------------------------------------------------------------------------


def kept_by_autograd(model, batch, length, autocast=False, twice=False) -> int:
    """Bytes that a forward of the backbone keeps for the backward pass, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = max(storage.nbytes(), seen.get(storage.data_ptr(), 0))
            held.append(tensor)
        return tensor

    held: list[torch.Tensor] = []  # so that no address is used twice
    ids = torch.randint(5, 95, (batch, length))
    model.train()
    if twice:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16, autocast):
        language_model(model).model(input_ids=ids, use_cache=False)
    return sum(seen.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("autocast", [False, True])
def test_activations_are_those_that_autograd_keeps(dtype, autocast):
    model, spec = pair(dtype=dtype)
    said = activations(
        facts(model.get_base_model(), spec, batch=1, length=64, autocast=2 if autocast else 0), tokens=64
    )
    assert said == pytest.approx(kept_by_autograd(model, 1, 64, autocast), rel=0.1)


def test_activations_where_all_weights_are_trained():
    model, spec = pair(dense=True)
    said = activations(facts(model, spec, batch=1, length=64), tokens=64)
    assert said == pytest.approx(kept_by_autograd(model, 1, 64), rel=0.2)  # without what weights of norms need


def test_with_checkpointing_the_inputs_of_layers_are_kept():
    model, spec = pair()
    known = facts(model.get_base_model(), spec, batch=1, length=64, checkpointing=True)
    inputs = memory.kept_inputs(known.decoder, 64, 4)
    kept = kept_by_autograd(model, 1, 64, twice=True)
    last_norm = 64 * 4 * known.decoder.hidden
    assert inputs + last_norm == pytest.approx(kept, rel=0.05)  # and a few cosines
    assert inputs < activations(known, 64) < activations(replace(known, checkpointing=False), 64)


def test_adapters_on_upper_layers_keep_nothing_below():
    model, spec = pair(layers_to_transform=[1], target_modules=["q_proj", "v_proj"])
    known = facts(model.get_base_model(), spec, batch=1, length=64)
    assert known.decoder.layers == 1
    whole, of_all = pair(target_modules=["q_proj", "v_proj"])
    assert activations(known, 64) < activations(facts(whole.get_base_model(), of_all, batch=1, length=64), 64)
    assert kept_by_autograd(model, 1, 64) == pytest.approx(activations(known, 64), rel=0.25)


class Largest(TorchDispatchMode):
    """Notes the sizes of what is made within."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and "empty" in str(func):
            self.sizes.append(out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize(("rows", "chunk"), [(40, 16), (10, 16)])
def test_the_workspace_of_a_loss_is_two_chunks_of_logits(rows, chunk):
    vocabulary, hidden = 300, 8
    h, h0 = torch.randn(2, rows, hidden)
    head = Head(torch.randn(vocabulary, hidden))
    with Largest() as made:
        targets = torch.zeros(rows, dtype=torch.int64)
        linear_divergence(h.requires_grad_(), h0, head, targets, Divergence(), chunk_rows=chunk)
    assert max(made.sizes) == memory.chunk_workspace(rows, chunk, vocabulary)


# --- the arithmetic ------------------------------------------------------------------------------------------------

SMALL = Decoder(hidden=10, intermediate=30, layers=3, heads=2, kv_heads=1, head_dim=5, vocabulary=100)


def test_what_is_larger_takes_more():
    sizes = [memory.layer_activations(SMALL, n, 2) for n in (1, 2)]
    assert sizes == [sizes[0], 2 * sizes[0]]
    assert sizes[0] == 8 * 10 + 2 * (2 * 2 * 5 + 2 * 5 + 3 * 30) + 4 * 2
    assert memory.layer_activations(SMALL, 1, 2, repeated=True) == sizes[0] + 2 * 2 * 5
    assert memory.eager_scores(SMALL, 4, 4, 2) == 4 * 4 * 2 * 6
    assert memory.eager_scores(SMALL, 4, 4, 4) == 4 * 4 * 2 * 4
    assert memory.fused_head(5000, 5000, SMALL, 2) == 4096 * 32768 * 2 + 4 * 5000 * 10
    assert memory.chunk_products(100, 64, 2**17, on_cpu=True) == 2 * 2**17 * 4
    assert memory.chunk_products(100, 64, 2**17, on_cpu=False) == 64 * 2**17 * 4


def test_a_peak_is_of_one_moment():
    parts = [
        Part("weights", 100, ""), Part("activations", 10, "", "forward"), Part("gradient", 1, "", "forward"),
        Part("tile", 5, "", "moment"), Part("workspace", 7, "", "moment"), Part("copies", 3, "", "update"),
        Part("one", 15, "", "start", of="a"), Part("two", 16, "", "start", of="b"), Part("file", 1000, "", "disk"),
        Part("host", 1000, "", "host"),
    ]  # fmt: skip
    assert peak(parts) == 100 + 10 + 1 + 7
    assert peak([*parts, Part("more", 3, "", "start", of="b")]) == 100 + 16 + 3
    assert peak([]) == 0


def test_sums_of_a_large_layer_are_sketched():
    assert memory_states.moment_sums([1024, 1025], 64) == 4 * (1024 * 1024 + 128 * 1025)
    assert memory_states.moment_sums([1024, 2000], 600) == 4 * (1024**2 + 2000**2)
    assert memory_states.moment_sums([10, 20], 64, diagonal=True) == 4 * 30
    assert memory_states.batches(10) == 240
