"""AlignGuard-LoRA's penalties and their rivals on real models: against dense float64, on hosts, as baselines."""

import copy
import warnings
from dataclasses import replace

import holdfast
import pytest
import torch
from holdfast.core.errors import ConfigError, NeverSupported, WrongSetup
from holdfast.core.selection import layer_updates, trainable
from holdfast.core.types import Weights
from holdfast.functional.packed_fishers import unpack
from holdfast.methods import (
    EWC,
    FisherAlignment,
    GeodesicSeparation,
    OrthogonalLoRA,
    RiemannianOverlap,
    TaskStability,
    UpdateDecay,
    alignguard_lora,
    safe_lora,
    scale_adapter,
)
from safetensors.torch import save_file

import runs
import tiny

FISHER = [
    FisherAlignment(strength=0.3, data="alignment"),
    FisherAlignment(strength=0.3, data=("alignment", "task")),
    FisherAlignment(strength=0.3, data="alignment", top=0.9),
    TaskStability(strength=0.3, data="alignment"),
    TaskStability(strength=0.3, data="alignment", metric="task"),
    RiemannianOverlap(strength=0.3, data="alignment"),
    RiemannianOverlap(strength=0.3, data="alignment", reduction="mean", signed=True, weight=0.0),
    GeodesicSeparation(strength=0.3, data="alignment"),
    GeodesicSeparation(strength=0.3, data="alignment", form="metric"),
    EWC(strength=0.3, data="alignment"),
    OrthogonalLoRA(strength=0.3, data="alignment"),
    UpdateDecay(strength=0.3),
]
TERMS = [method for method in FISHER if not getattr(method, "signed", False)]


def sets():
    return {"alignment": tiny.batches(3), "task": tiny.batches(3, seed=7)}


def name(method):
    return method.describe()


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}  # where F itself is formed, [d k, d k]


def student(kind="lora", dtype=torch.float64, shape=None, **options):
    base = tiny.llama(**(shape or {}))
    return (base if kind == "dense" else tiny.lora(base, **options)).to(dtype)


def prepared(method, model, retain=None):
    """The method's state on a fresh model, and its penalty as a function of the model's weights."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with holdfast.preserve(model, optimizer, [method], retain=sets() if retain is None else retain) as session:
        session.gradients_ready()
        state = session._states[0]

    def penalty():
        params = trainable(model)
        return method.penalty(state, Weights(params, layer_updates(model, params)))

    return state, penalty


def delta(model):
    """dW of each layer, dense, by PEFT's own arithmetic."""
    return {
        module_name: module.get_delta_weight("default").detach()
        for module_name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


# --- the equations, written out in full ----------------------------------------------------------------------------


def factor(f):
    if f.vectors is None:
        return f.values.double().diag()
    q = f.vectors.double()
    return f.rest.double() * (torch.eye(f.size) - q @ q.T) + q @ f.values.double().diag() @ q.T


def full(fisher):
    return torch.kron(factor(fisher.out), factor(fisher.into))


def leading(fisher, share=0.9, most=64):
    """The leading eigenvalues [m] and eigenvectors [d k, m] of the dense Fisher."""
    values, vectors = torch.linalg.eigh(full(fisher))
    values, vectors = values.flip(0), vectors.flip(1)
    m = min(int((values.cumsum(0) / values.sum() < share).sum()) + 1, most)
    return values[:m], vectors[:, :m]


def term(method, dw, fishers, task):
    """One layer's penalty for one retain set, from dense matrices."""
    flat = dw.flatten()
    if isinstance(method, UpdateDecay):
        return flat @ flat
    if isinstance(method, OrthogonalLoRA):
        into = fishers.into.vectors.double()[:, : method.directions]
        return (dw @ into).square().sum()
    if isinstance(method, EWC):
        return 0.5 * flat @ full(fishers) @ flat
    if isinstance(method, FisherAlignment) and method.top is None:
        return flat @ full(fishers) @ flat
    values, vectors = leading(fishers)
    inside = vectors.T @ flat
    part = vectors @ inside
    rest = flat - part
    if isinstance(method, FisherAlignment):
        return (values * inside.square()).sum()
    if isinstance(method, TaskStability):
        return rest @ full(task) @ rest if method.metric == "task" else rest @ rest
    if isinstance(method, RiemannianOverlap):
        eta = 1 + method.weight * torch.sigmoid((part + rest).abs() - 0.01)
        products = part * rest if method.signed else (part * rest).abs()
        return (eta * products).mean() if method.reduction == "mean" else (eta * products).sum()
    if method.form == "metric":
        m = full(task)
        return (part @ m @ rest) ** 2 / ((part @ m @ part) * (rest @ m @ rest) + 1e-12)
    _, others = leading(task)
    other = others @ (others.T @ flat)
    return (part @ other) ** 2 / ((part @ part) * (other @ other) + 1e-12)


def sets_of(state, place):
    names = dict.fromkeys(key.split("/")[1] for key in state if key.startswith(f"{place}/"))
    return [unpack(state, f"{place}/{n}/") for n in names]


@pytest.mark.parametrize("method", FISHER, ids=name)
def test_a_penalty_is_its_equation_in_dense_float64(method):
    """Made on the fresh adapter, read on a moved one; the issue's bar is 1e-10."""
    model = student(shape=SMALL)
    state, penalty = prepared(method, model)
    tiny.shake(model)
    used = sets_of(state, "fisher")
    if not used:  # decay and input directions keep no Fisher
        used = sets_of(prepared(FisherAlignment(data="alignment"), student(shape=SMALL))[0], "fisher")
    other = sets_of(state, "against") or sets_of(state, "task") or [dict.fromkeys(used[0])]
    expected = sum(
        term(method, dw, fishers[layer], other[0][layer]) for fishers in used for layer, dw in delta(model).items()
    ) / len(used)
    assert penalty().item() == pytest.approx(method.strength * expected.item(), rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("method", TERMS, ids=name)
def test_gradients_are_right(method):
    """Against central differences in float64, along random directions."""
    if isinstance(method, RiemannianOverlap):
        method = replace(method, weight=0.0)  # η is a weight that no gradient flows through, so it must not vary here
    model = student()
    _, penalty = prepared(method, model)
    tiny.shake(model)
    params = list(trainable(model).values())
    gradients = torch.autograd.grad(penalty(), params)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
        slope = sum((g * a).sum() for g, a in zip(gradients, along, strict=True)).item()
        values = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                for p, a in zip(params, along, strict=True):
                    p.add_(a, alpha=step)
                values.append(penalty().item())
        with torch.no_grad():
            for p, a in zip(params, along, strict=True):
                p.add_(a, alpha=1e-6)
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("method", TERMS, ids=name)
def test_nothing_depends_on_how_the_factors_share_the_update(method):
    """(B R, R⁻¹ A) is the same update."""
    model = student()
    _, penalty = prepared(method, model)
    tiny.shake(model)
    before = penalty().item()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_A"):
                turn = torch.randn(4, 4, generator=generator, dtype=torch.float64) + 3 * torch.eye(4)
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                a.copy_(torch.linalg.solve(turn, a))
                b.copy_(b @ turn)
    assert penalty().item() == pytest.approx(before, rel=1e-9)
    assert before > 0


@pytest.mark.parametrize("method", TERMS, ids=name)
def test_a_fresh_adapter_has_no_penalty_and_no_pull(method):
    model = student(dtype=torch.float32)
    _, penalty = prepared(method, model)
    value = penalty()
    gradients = torch.autograd.grad(value, list(trainable(model).values()), allow_unused=True)
    assert value.item() == 0
    assert all(g is None or not g.any() for g in gradients)


@pytest.mark.parametrize("method", TERMS, ids=name)
def test_a_layer_trained_whole_has_the_penalty_of_its_change(method):
    """The same dW, once in LoRA's factors and once added to the dense weights."""
    adapted, dense = student(), student("dense")
    _, low_rank = prepared(method, adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # embeddings and norms are not part of any update
        _, whole = prepared(method, dense)
    tiny.shake(adapted)
    layers = dict(dense.named_modules())
    with torch.no_grad():
        for layer, dw in delta(adapted).items():
            layers[layer.removeprefix("base_model.model.")].weight.add_(dw)
    assert whole().item() == pytest.approx(low_rank().item(), rel=1e-8)


def test_geodesic_separation_as_written_is_nothing():
    """<dW_A, dW_T> = 0 for every dW: below 1e-10 in value; the run stays that of no method to round-off."""
    method = GeodesicSeparation(data="alignment", form="complement", strength=100.0)
    model = student()
    _, penalty = prepared(method, model)
    tiny.shake(model)
    assert penalty().item() < 1e-10
    alone, _ = runs.loop(None, student())
    with_it, _ = runs.loop([method], student(), retain=sets())
    assert runs.difference(tiny.trained(with_it), tiny.trained(alone)) < 1e-10


def test_two_adapters_of_a_layer():
    """Their updates add up; the geodesic term compares them; one adapter alone is refused."""
    model = student()
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.to(torch.float64).base_model.set_adapter(["default", "second"])
    _, size = prepared(UpdateDecay(strength=1.0), model)
    _, angle = prepared(GeodesicSeparation(form="adapters", data="alignment", strength=1.0), model)
    tiny.shake(model)
    first = {n: m.get_delta_weight("default").detach() for n, m in model.named_modules() if hasattr(m, "lora_A")}
    second = {n: m.get_delta_weight("second").detach() for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert size().item() == pytest.approx(sum((first[n] + second[n]).square().sum().item() for n in first), rel=1e-10)
    cosines = [(first[n] * second[n]).sum() ** 2 / (first[n].square().sum() * second[n].square().sum()) for n in first]
    assert angle().item() == pytest.approx(sum(cosines).item(), rel=1e-6)
    with pytest.raises(WrongSetup, match="has 1"):
        prepared(GeodesicSeparation(form="adapters", data="alignment"), student())


# --- what is refused, and what is told -----------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_moves_the_base_is_refused_by_name(init):
    with pytest.raises(NeverSupported, match=init):
        prepared(UpdateDecay(), student(dtype=torch.float32, init_lora_weights=init))


def test_dora_and_rslora_are_taken():
    for options in ({"use_dora": True}, {"use_rslora": True}):
        model = student(**options)
        _, penalty = prepared(UpdateDecay(strength=1.0), model)
        tiny.shake(model)
        scale = 8 / 4**0.5 if "use_rslora" in options else 2.0
        expected = sum(
            (scale * m.lora_B["default"].weight @ m.lora_A["default"].weight).square().sum().item()
            for m in model.modules()
            if hasattr(m, "lora_A")
        )
        assert penalty().item() == pytest.approx(expected, rel=1e-10)


def test_what_forms_no_update_is_refused_or_told():
    model = tiny.llama()
    for parameter_name, p in model.named_parameters():
        p.requires_grad_("norm" in parameter_name)
    with pytest.raises(WrongSetup, match="penalises weight updates"):
        prepared(UpdateDecay(), model)
    with pytest.warns(UserWarning, match="does not see"):
        prepared(UpdateDecay(), tiny.llama())


def test_a_missing_set_is_named():
    with pytest.raises(WrongSetup, match="alignment"):
        prepared(FisherAlignment(data="alignment"), student(), retain=tiny.batches(3))


def test_all_faults_of_a_configuration_at_once():
    with pytest.raises(ConfigError) as caught:
        FisherAlignment(kind="dense", labels="none", rows=0, keep=0, top=2.0, most=99, rotated=True)
    assert len(caught.value.faults) >= 6
    with pytest.raises(ConfigError, match="as_published compares A"):
        OrthogonalLoRA(as_published=True)
    with pytest.raises(ConfigError, match="rotated is of no use here"):
        OrthogonalLoRA(rotated=True)
    with pytest.raises(ConfigError, match="reduction must be"):
        RiemannianOverlap(reduction="max", weight=-1, quantile=2.0, temperature=0.0)
    with pytest.raises(ConfigError, match="form must be one of"):
        GeodesicSeparation(form="literal")


def test_the_order_of_sets_does_not_depend_on_the_file():
    """Sums of floats depend on it, and a checkpoint may be read in any order."""
    method = FisherAlignment()
    state, _ = prepared(method, student())
    layers = list(method.fishers(state)[0])
    turned = dict(reversed(state.items()))
    one, other = ([[f[n].out.values[0].item() for n in layers] for f in method.fishers(s)] for s in (state, turned))
    assert one == other
    assert one[0] != one[1]


# --- hosts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["sft", "dpo"])
@pytest.mark.parametrize("form", ["paper", "full"])
def test_the_preset_brings_its_own_data_to_a_trl_trainer(host, form):
    """The two lines of a user: rows in a TRL format, no retain argument."""
    general = {"general": {"text": tiny.texts()}} if form == "full" else {"task": tiny.prompt_completion(8, seed=2)}
    made = runs.trainer(host, steps=12)
    session = holdfast.attach(made, alignguard_lora(alignment=tiny.prompt_completion(8), form=form, **general))
    made.train()
    logged = {key for entry in made.state.log_history for key in entry if key.startswith("holdfast/")}
    assert len(session.methods) == (4 if form == "paper" else 1)
    for method in session.methods:
        assert {f"holdfast/{method.name}/penalty", f"holdfast/{method.name}/gradient_ratio"} <= logged
    assert ("holdfast/task_stability/alignment_share" in logged) == (form == "paper")
    assert "holdfast/fisher_alignment/squared_norm" in logged
    last = [e for e in made.state.log_history if "holdfast/fisher_alignment/penalty" in e][-1]
    assert last["holdfast/fisher_alignment/penalty"] > 0


def test_a_set_given_twice_is_refused():
    rows = tiny.prompt_completion(8)
    with pytest.raises(WrongSetup, match="'alignment' comes with the methods"):
        holdfast.attach(runs.trainer("sft"), alignguard_lora(alignment=rows), retain={"alignment": rows})


def test_four_terms_share_one_pass(monkeypatch, tmp_path):
    """The Fishers of one session are collected once for all methods that ask for the same."""
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path))
    model = student(dtype=torch.float32)
    forwards = []
    model.get_base_model().model.register_forward_hook(lambda *_: forwards.append(1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    counts = []
    for methods in (alignguard_lora()[:1], alignguard_lora()):
        monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / str(len(methods))))
        forwards.clear()
        with holdfast.preserve(model, optimizer, methods, retain=sets()) as session:
            before = len(forwards)  # the tap's own check
            session.gradients_ready()
            counts.append(len(forwards) - before)
    assert counts[0] == counts[1] > 0


def test_overlap_with_another_set_is_logged():
    """1 for a set compared with itself."""
    model = student(dtype=torch.float32)
    method = FisherAlignment(data="alignment", compare=("alignment", "task"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with holdfast.preserve(model, optimizer, [method], retain=sets()) as session:
        session.gradients_ready()
        logged = session.pop_metrics()
    assert logged["holdfast/fisher_alignment/overlap/alignment"] == pytest.approx(1, abs=1e-4)
    assert 0 < logged["holdfast/fisher_alignment/overlap/task"] < 0.99


# --- baselines -----------------------------------------------------------------------------------------------------


def test_a_rotated_fisher_has_the_same_spectrum_and_other_directions():
    plain, _ = prepared(FisherAlignment(data="alignment"), student())
    rotated, _ = prepared(FisherAlignment(data="alignment", rotated=True), student())
    turned = sets_of(rotated, "fisher")[0]
    for layer, one in sets_of(plain, "fisher")[0].items():
        other = turned[layer]
        assert torch.equal(one.out.values, other.out.values)
        torch.testing.assert_close(
            torch.linalg.eigvalsh(factor(one.out)), torch.linalg.eigvalsh(factor(other.out)), atol=1e-5, rtol=1e-5
        )
        assert (one.out.vectors - other.out.vectors).abs().max() > 0.1


def test_orthogonal_lora_reads_an_earlier_adapter(tmp_path):
    earlier = student(seed=5)
    tiny.shake(earlier, seed=6)
    earlier.save_pretrained(tmp_path)
    model = student()
    tiny.shake(model)
    pairs = [
        (one.lora_A["default"].weight.detach(), other.lora_A["default"].weight.detach())
        for one, other in zip(model.modules(), earlier.modules(), strict=True)
        if hasattr(one, "lora_A")
    ]
    _, published = prepared(OrthogonalLoRA(strength=1.0, earlier=str(tmp_path), as_published=True), model)
    expected = sum((other @ one.T).abs().sum() for one, other in pairs).item()
    assert published().item() == pytest.approx(expected, rel=1e-10)
    _, ours = prepared(OrthogonalLoRA(strength=1.0, earlier=str(tmp_path)), model, retain=[])  # needs no data
    bases = [torch.linalg.qr(other.T)[0] for _, other in pairs]
    expected = sum((dw @ p).square().sum() for dw, p in zip(delta(model).values(), bases, strict=True)).item()
    assert ours().item() == pytest.approx(expected, rel=1e-10)
    save_file({"other.lora_A.weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(WrongSetup, match="no factor A for 14 of the layers"):
        prepared(OrthogonalLoRA(earlier=str(tmp_path)), student())
    with pytest.raises(WrongSetup, match="is not there"):
        prepared(OrthogonalLoRA(earlier=str(tmp_path / "nowhere")), student())


def test_scaling_an_adapter():
    model = student().eval()
    tiny.shake(model)
    batch = {k: v for k, v in tiny.batches(1)[0].items() if k != "labels"}
    with torch.no_grad():
        whole = model(**batch).logits
        with scale_adapter(model, 0.0):
            off = model(**batch).logits
        with model.disable_adapter():
            base = model(**batch).logits
        assert torch.equal(model(**batch).logits, whole)
        with scale_adapter(model, 0.5):
            half = {n: d.clone() for n, d in delta(model).items()}
    torch.testing.assert_close(off, base)
    assert runs.difference({n: 2 * d for n, d in half.items()}, delta(model)) < 1e-12
    with pytest.raises(WrongSetup, match="no LoRA adapter"), scale_adapter(tiny.llama(), 0.5):
        pass


def test_safe_lora_projects_the_layers_that_are_least_alike():
    model = student()
    tiny.shake(model)
    aligned = {
        n.removeprefix("base_model.model."): m.base_layer.weight
        for n, m in model.named_modules()
        if hasattr(m, "lora_A")
    }
    generator = torch.Generator().manual_seed(0)
    unaligned = {n: w + torch.randn(w.shape, generator=generator, dtype=w.dtype) for n, w in aligned.items()}
    before, kept = delta(model), copy.deepcopy(model)
    projections = {}
    for layer, dw in before.items():
        v = aligned[layer.removeprefix("base_model.model.")] - unaligned[layer.removeprefix("base_model.model.")]
        projections[layer] = v @ v.T / v.norm() @ dw
    cosines = {n: float((dw * projections[n]).sum() / dw.norm() / projections[n].norm()) for n, dw in before.items()}
    lowest = sorted(cosines, key=cosines.__getitem__)[:3]
    assert safe_lora(model, aligned, unaligned, layers=3) == lowest
    after = delta(model)
    for layer, dw in before.items():
        torch.testing.assert_close(after[layer], projections[layer] if layer in lowest else dw, rtol=1e-5, atol=1e-7)
    assert safe_lora(kept, aligned, unaligned, threshold=1.1) == sorted(cosines, key=cosines.__getitem__)
    with pytest.raises(WrongSetup, match="did not change"):
        safe_lora(kept, aligned, aligned)
    with pytest.raises(WrongSetup, match="no weight of"):
        safe_lora(kept, {}, {})
