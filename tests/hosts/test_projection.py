"""What orthogonal projection promises, measured on real runs: leakage, equivalences, and no trace on the run."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import holdfast
import pytest
import torch
from holdfast.core.errors import ConfigError, NeverSupported, WrongSetup
from holdfast.core.method import GradientMethod
from holdfast.functional import named
from holdfast.methods import AGEM, L2SP, OrthogonalProjection, PCGrad, RandomSubspace, ogpsa
from holdfast.methods.gradient import subspace_method

import runs
import tiny

pytestmark = pytest.mark.filterwarnings("ignore:orthogonal_projection. halves of the retain rows")
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda params: torch.optim.Adam(params, lr=1e-2, amsgrad=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0),
    "adamw with decay": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.5),
}


def shaken(kind="lora"):
    model = tiny.lora(tiny.llama()) if kind == "lora" else tiny.llama()
    tiny.shake(model)
    return model


def parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def retain_gradients(model, batches):
    """The gradient of each batch's mean token loss by the model's own loss, as rows."""
    rows = [torch.autograd.grad(model(**batch).loss, parameters(model)) for batch in batches]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def steps(methods, optimizer, *, kind="lora", clip=None, retain=None, n=3, watch=None):
    """A plain loop that hands each step's weights before and after, as vectors, to `watch`."""
    model = shaken(kind)
    model.eval()
    made = OPTIMIZERS[optimizer](parameters(model)) if isinstance(optimizer, str) else optimizer(parameters(model))
    retain = retain if retain is not None else tiny.batches(4)
    with holdfast.preserve(model, made, methods, retain=retain) as session:
        for number, batch in enumerate(tiny.batches(n, size=4, seed=9)):
            rows = retain_gradients(model, tiny.batches(4))
            model(**batch).loss.backward()
            session.gradients_ready()
            if clip:
                torch.nn.utils.clip_grad_norm_(parameters(model), clip)
            before = torch.cat([p.detach().flatten() for p in parameters(model)]).double()
            made.step()
            made.zero_grad()
            after = torch.cat([p.detach().flatten() for p in parameters(model)]).double()
            if watch:
                watch(number, rows, before - after)
        return model, session.pop_metrics()


def worst_cosine(rows, update):
    rows = rows.double()
    return float(((rows @ update).abs() / (rows.norm(dim=1) * update.norm())).max())


@pytest.mark.parametrize("metric", ["euclidean", "optimizer"])
@pytest.mark.parametrize("kind", ["lora", "dense"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_update_has_no_component_along_any_reference(optimizer, kind, metric):
    """The measured guarantee: |g · d| / (|g| |d|) <= 1e-6 for the gradients of the retain loss, by the model itself."""
    seen = []
    method = OrthogonalProjection(rank=4, refresh_every=1, metric=metric)
    _, metrics = steps([method], optimizer, kind=kind, clip=0.1, watch=lambda n, g, d: seen.append(worst_cosine(g, d)))
    plain = []
    steps([], optimizer, kind=kind, clip=0.1, watch=lambda n, g, d: plain.append(worst_cosine(g, d)))
    assert len(seen) == 3
    assert max(seen) <= 1e-6
    assert min(plain) > 1e-3  # there was something to remove
    assert 0 <= metrics["holdfast/orthogonal_projection/leakage"] <= 1e-6


def test_projecting_the_gradient_is_exact_under_sgd_alone():
    method = OrthogonalProjection(rank=4, refresh_every=1, apply_to="gradient")
    seen = {}
    for optimizer in OPTIMIZERS:
        _, metrics = steps([method], optimizer)
        seen[optimizer] = metrics["holdfast/orthogonal_projection/leakage"]
    assert seen["sgd"] <= 1e-5
    assert min(seen[o] for o in OPTIMIZERS if o != "sgd") > 1e-3  # and it says so in the log


def test_under_sgd_gradient_and_update_are_the_same():
    gradient, _ = steps([OrthogonalProjection(rank=4, refresh_every=1, apply_to="gradient")], "sgd")
    for metric in ("euclidean", "optimizer"):
        update, _ = steps([OrthogonalProjection(rank=4, refresh_every=1, metric=metric)], "sgd")
        assert runs.difference(tiny.trained(update), tiny.trained(gradient)) <= 1e-6


def test_the_optimizers_moments_are_those_of_the_raw_gradient():
    """One step from the same weights: the projected run's Adam state is the plain run's, bit for bit."""
    states = []
    for methods in ([], [OrthogonalProjection(rank=4)]):
        model = shaken().eval()
        optimizer = torch.optim.AdamW(parameters(model), lr=1e-2)
        with holdfast.preserve(model, optimizer, methods, retain=tiny.batches(4)) as session:
            model(**tiny.batches(1)[0]).loss.backward()
            session.gradients_ready()
            optimizer.step()
        states.append([optimizer.state[p]["exp_avg"] for p in parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_in_the_optimizers_metric_a_first_step_never_ascends():
    """g · d' >= 0 for Adam's first step (which is D g), whatever the references are."""
    for seed in range(5):
        model = shaken().eval()
        optimizer = torch.optim.Adam(parameters(model), lr=1e-2)
        retain = tiny.batches(4, seed=seed)
        method = OrthogonalProjection(rank=4, metric="optimizer")
        with holdfast.preserve(model, optimizer, [method], retain=retain) as session:
            model(**tiny.batches(1, seed=seed + 50)[0]).loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in parameters(model)])
            before = torch.cat([p.detach().flatten() for p in parameters(model)])
            session.gradients_ready()
            optimizer.step()
            update = before - torch.cat([p.detach().flatten() for p in parameters(model)])
        assert gradient @ update > 0


def test_an_optimizer_without_a_known_metric_is_refused():
    with pytest.raises(WrongSetup, match=r"Adam, AdamW and SGD.*euclidean"):
        steps([OrthogonalProjection(metric="optimizer")], lambda p: torch.optim.RMSprop(p, lr=1e-3))
    _, metrics = steps([OrthogonalProjection(rank=4)], lambda p: torch.optim.RMSprop(p, lr=1e-3))
    assert metrics["holdfast/orthogonal_projection/leakage"] <= 1e-6


@pytest.mark.parametrize("scope", ["layer", "tensor"])
def test_scopes_constrain_every_block(scope):
    def watch(number, rows, update):
        start = 0
        groups = {}
        for name, p in shaken().named_parameters():
            if p.requires_grad:
                key = name if scope == "tensor" else name.split(".layers.")[1].split(".")[0]
                groups.setdefault(key, []).extend(range(start, start + p.numel()))
                start += p.numel()
        assert len(groups) == (2 if scope == "layer" else 28)
        for places in groups.values():
            part = rows[:, places]
            if part.any():
                # a block of the update may be as short as float32 can hold: measured against the whole update's length
                inside = (part.double() @ update[places]).abs() / (part.double().norm(dim=1) * update.norm())
                assert inside.max() <= 1e-6

    steps([OrthogonalProjection(rank=4, refresh_every=1, scope=scope)], "adamw with decay", watch=watch)


def test_one_sided_stops_harm_and_lets_help_through():
    harm, help_ = [], []

    def watch(number, rows, update):
        cosines = rows.double() @ update / (rows.double().norm(dim=1) * update.norm())
        harm.append(float(-cosines.min()))
        help_.append(float(cosines.max()))

    steps([OrthogonalProjection(rank=4, refresh_every=1, sides="one")], "adamw", watch=watch)
    assert max(harm) <= 1e-6
    assert max(help_) > 1e-2


def test_strength_is_a_share():
    updates = []
    for strength in (0.5, 1.0):
        method = OrthogonalProjection(rank=4, strength=strength, early_refreshes=())
        steps([method], "adamw", n=1, watch=lambda n, g, d: updates.append(d))
    steps([], "adamw", n=1, watch=lambda n, g, d: updates.append(d))
    half, full, none = updates
    assert (half - (full + none) / 2).norm() <= 1e-5 * none.norm()


# --- references ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Asks(GradientMethod):
    """Asks for reference gradients and does nothing with them."""

    name: ClassVar[str] = "asks"
    uses_retain: ClassVar[bool] = True
    refresh_every: int | None = 1
    seen: ClassVar[list] = []

    def init(self, setup):
        drawn = setup.draw(100, False)
        self.seen.append(setup.references(list(drawn.values()), "likelihood", 0.0))
        return {"rows": self.seen[-1].rows}

    def transform(self, state, step):
        return step


@pytest.mark.parametrize("apply_to", ["gradient", "update"])
@pytest.mark.parametrize("host", ["sft", "dpo", "trainer", "loop"])
def test_refreshing_and_not_projecting_is_bit_identical_to_not_refreshing(host, apply_to):
    """No reference gradient reaches a buffer, an accumulator, a random-number generator or a normaliser (defect D1)."""

    def train(methods):
        model = tiny.lora(tiny.llama(attention_dropout=0.1), lora_dropout=0.1)
        if host == "loop":
            torch.manual_seed(0)
            return runs.loop(methods, model, split=2)[0]
        return runs.train(host, methods, model).model

    assert runs.identical(train([Asks(apply_to=apply_to)]), train(None))


def test_reference_gradients_are_token_weighted_means_of_sets():
    model = shaken().eval()
    sets = {"first": tiny.batches(2, seed=1), "second": tiny.batches(1, seed=2)}
    Asks.seen.clear()
    with holdfast.preserve(model, OPTIMIZERS["sgd"](parameters(model)), [Asks()], retain=sets) as session:
        session.gradients_ready()
    found = Asks.seen[0]
    for row, loss, count, batches in zip(found.rows, found.losses, found.counts, sets.values(), strict=True):
        tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
        total = sum(model(**b, num_items_in_batch=torch.tensor(tokens)).loss for b in batches)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters(model))])
        assert (row - gradient).norm() <= 1e-5 * gradient.norm()
        assert float(loss) == pytest.approx(float(total.detach()), rel=1e-5)
        assert int(count) == tokens


def preference_batch(seed=0):
    """Two pairs in TRL's layout: chosen rows, then rejected rows, of the same prompts."""
    rows = tiny.batches(1, size=4, seed=seed)[0]
    rows["input_ids"][2:, :2] = rows["input_ids"][:2, :2]
    mask = rows["attention_mask"].clone()
    mask[:, :2] = 0
    return {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"], "completion_mask": mask}


def log_probabilities(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    each = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (each * batch["completion_mask"][:, 1:]).sum(1)


@pytest.mark.parametrize("loss", ["likelihood", "chosen_and_rejected", "preference"])
def test_losses_on_preferences(loss):
    """Chosen alone, both answers, or DPO's own loss against the base: each by hand."""

    @dataclass(frozen=True, kw_only=True)
    class Takes(Asks):
        uses_reference: ClassVar[bool] = True

        def init(self, setup):
            self.seen.append(setup.references([setup.retain(1)], loss, 0.3))
            return {}

    model, batch = shaken().eval(), preference_batch()
    Asks.seen.clear()
    sgd = OPTIMIZERS["sgd"](parameters(model))
    with holdfast.preserve(model, sgd, [Takes()], retain=[batch], reference="base") as session:
        session.gradients_ready()
        session.gradients_ready()  # the base's log-probabilities come from the cache now
    student = log_probabilities(model, batch)
    tokens = batch["completion_mask"][:, 1:].sum(1)
    if loss == "likelihood":
        expected, count = -student[:2].sum() / tokens[:2].sum(), tokens[:2].sum()
    elif loss == "chosen_and_rejected":
        expected, count = -student.sum() / tokens.sum(), tokens.sum()
    else:
        with torch.no_grad(), model.disable_adapter():
            base = log_probabilities(model, batch)
        margin = (student - base)[:2] - (student - base)[2:]
        expected, count = -torch.nn.functional.logsigmoid(0.3 * margin).mean(), torch.tensor(2)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected, parameters(model))])
    assert len(Asks.seen) == 2
    for found in Asks.seen:
        assert (found.rows[0] - gradient).norm() <= 1e-4 * gradient.norm()
        assert float(found.losses[0]) == pytest.approx(float(expected.detach()), rel=1e-5)
        assert int(found.counts[0]) == int(count)


def test_both_losses_are_two_constraints():
    model = shaken().eval()
    sgd = OPTIMIZERS["sgd"](parameters(model))
    pairs = [preference_batch(seed) for seed in range(4)]
    method = OrthogonalProjection(rank=None, references="both", refresh_every=1)
    with holdfast.preserve(model, sgd, [method], retain=pairs, reference="base") as session:
        model(**tiny.batches(1)[0]).loss.backward()
        session.gradients_ready()
        assert session._states[0]["basis"].shape[0] == 2
        sgd.step()
        assert session.pop_metrics()["holdfast/orthogonal_projection/leakage"] <= 1e-6


def test_preference_references_on_text_are_refused():
    model, method = shaken(), OrthogonalProjection(references="preference")
    sgd, retain = OPTIMIZERS["sgd"](parameters(model)), tiny.batches(2)
    with holdfast.preserve(model, sgd, [method], retain=retain, reference="base") as session:
        with pytest.raises(WrongSetup, match="reads preferences"):
            session.gradients_ready()


def test_rank_none_is_one_mean_for_each_set():
    sets = {"first": tiny.batches(2, seed=1), "second": tiny.batches(2, seed=2)}
    model = shaken().eval()
    sgd = OPTIMIZERS["momentum"](parameters(model))
    with holdfast.preserve(model, sgd, [OrthogonalProjection(rank=None)], retain=sets) as session:
        means = []
        for batches in sets.values():
            tokens = torch.tensor(sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches))
            total = sum(model(**b, num_items_in_batch=tokens).loss for b in batches)
            means.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters(model))]))
        before = torch.cat([p.detach().flatten() for p in parameters(model)]).double()
        model(**tiny.batches(1, seed=9)[0]).loss.backward()
        session.gradients_ready()
        sgd.step()
        update = before - torch.cat([p.detach().flatten() for p in parameters(model)]).double()
    assert worst_cosine(torch.stack(means), update) <= 1e-6
    with pytest.raises(WrongSetup, match="rank=1 is less than"):
        steps([OrthogonalProjection(rank=1)], "sgd", retain=sets)


def test_few_rows_are_dealt_out_one_by_one():
    """Two batches of two rows make four references, not two."""
    model = shaken().eval()
    with holdfast.preserve(
        model, OPTIMIZERS["sgd"](parameters(model)), [OrthogonalProjection(rank=16)], retain=tiny.batches(2)
    ) as session:
        session.gradients_ready()
        assert session._states[0]["basis"].shape[0] == 4


# --- refresh -------------------------------------------------------------------------------------------------------


def births(method, n=14):
    model = shaken().eval()
    optimizer = OPTIMIZERS["adamw"](parameters(model))
    born = []
    with holdfast.preserve(model, optimizer, [method], retain=tiny.batches(8)) as session:
        for batch in tiny.batches(n, size=2, seed=9):
            model(**batch).loss.backward()
            session.gradients_ready()
            born.append(int(session._states[0]["born"]))
            optimizer.step()
            optimizer.zero_grad()
    return sorted(set(born))


def test_when_the_basis_is_made_anew():
    assert births(OrthogonalProjection()) == [0, 2, 5, 10]
    assert births(OrthogonalProjection(refresh_every=None)) == [0, 2, 5]
    assert births(OrthogonalProjection(refresh_every=None, early_refreshes=())) == [0]
    assert births(OrthogonalProjection(refresh_every=4, early_refreshes=())) == [0, 4, 8, 12]


def test_auto_stretches_while_weights_stand_still_and_shrinks_when_they_run():
    gaps = {}
    for name, rate in (("still", 1e-7), ("running", 0.3)):
        model = shaken().eval()
        optimizer = torch.optim.SGD(parameters(model), lr=rate, momentum=0.9)
        born = []
        method = OrthogonalProjection(refresh_every="auto", early_refreshes=(), rank=4, strength=0.01)
        with holdfast.preserve(model, optimizer, [method], retain=tiny.batches(4)) as session:
            for batch in tiny.batches(60, size=2, seed=9):
                model(**batch).loss.backward()
                session.gradients_ready()
                born.append(int(session._states[0]["born"]))
                optimizer.step()
                optimizer.zero_grad()
        gaps[name] = sorted(set(born))
    assert gaps["still"] == [0, 5, 15, 35]  # 5, 10, 20, 40: the same rows, the same weights, so the basis stays good
    assert len(gaps["running"]) > len(gaps["still"])


def test_rolling_renews_one_gradient_at_a_time():
    method = OrthogonalProjection(rank=4, rolling=0.0, refresh_every=1, early_refreshes=())
    model = shaken().eval()
    optimizer = OPTIMIZERS["adamw"](parameters(model))
    retain = tiny.batches(4, seed=21)
    with holdfast.preserve(model, optimizer, [method], retain=retain) as session:
        for number, batch in enumerate(tiny.batches(3, size=2, seed=9)):
            before = None if session._states is None else session._states[0]["rows"].clone()
            rows = retain_gradients(model, retain)
            model(**batch).loss.backward()
            session.gradients_ready()
            after = session._states[0]["rows"]
            if before is not None:
                changed = [i for i in range(4) if not torch.equal(before[i], after[i])]
                assert changed == [number - 1]
                assert (after[number - 1] - rows[number - 1]).norm() <= 1e-5 * rows[number - 1].norm()
            optimizer.step()
            optimizer.zero_grad()
            # the Gram matrix was renewed by one row: it is that of the rows that are there
            products = session._states[0]["products"][0]
            assert torch.allclose(products, after.double() @ after.double().T, rtol=1e-6, atol=1e-12)
        assert session.pop_metrics()["holdfast/orthogonal_projection/leakage"] <= 1e-6


def test_a_rolling_mean_moves_by_its_share():
    method = OrthogonalProjection(rank=1, rolling=0.75, refresh_every=1, early_refreshes=())
    model = shaken().eval()
    optimizer = torch.optim.SGD(parameters(model), lr=0.0)
    retain = tiny.batches(4, seed=21)
    rows = retain_gradients(model, retain)
    with holdfast.preserve(model, optimizer, [method], retain=retain) as session:
        session.gradients_ready()
        first = session._states[0]["rows"][0].clone()
        session.gradients_ready()
        assert (session._states[0]["rows"][0] - (0.75 * first + 0.25 * rows[0])).norm() <= 1e-5 * first.norm()


def test_a_noisy_reference_is_warned_of():
    noise = tiny.batches(2, seed=33, size=1)
    with pytest.warns(UserWarning, match="cosine below 0.1"):
        steps([OrthogonalProjection(rank=2)], "sgd", retain=noise, n=1)


def test_repair_descends_where_a_reference_loss_has_risen():
    """Without a task, from weights moved after the start: the reference loss falls again; off, it stays."""
    losses = {}
    for repair in (0.0, 0.3):
        model = shaken().eval()
        optimizer = torch.optim.SGD(parameters(model), lr=0.05)
        method = OrthogonalProjection(rank=4, refresh_every=1, repair=repair)
        with holdfast.preserve(model, optimizer, [method], retain=tiny.batches(4)) as session:
            session.gradients_ready()
            if repair:
                session._states[0]["start"] -= 1.0  # as if the loss had begun lower
            for batch in tiny.batches(8, size=4, seed=9):
                model(**batch).loss.backward()
                session.gradients_ready()
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                losses[repair] = float(sum(model(**b).loss for b in tiny.batches(4)))
    assert losses[0.3] < losses[0.0] - 0.01


def test_the_leak_is_added_to_the_first_gradient_after_a_refresh():
    seen = {}
    for leak in (0.0, 0.5):
        model = shaken().eval()
        method = OrthogonalProjection(
            rank=None, apply_to="gradient", leak=leak, refresh_every=2, early_refreshes=(), samples=100
        )
        optimizer = torch.optim.SGD(parameters(model), lr=0.0)
        with holdfast.preserve(model, optimizer, [method], retain=tiny.batches(2)) as session:
            for step in range(2):
                model(**tiny.batches(1, seed=9)[0]).loss.backward()
                session.gradients_ready()
                seen[leak, step] = torch.cat([p.grad.flatten() for p in parameters(model)])
                optimizer.zero_grad()
    batches = tiny.batches(2)
    tokens = torch.tensor(sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches))
    total = sum(model(**b, num_items_in_batch=tokens).loss for b in batches)
    reference = torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters(model))])
    assert (seen[0.5, 0] - seen[0.0, 0] - 0.5 * reference).norm() <= 1e-5 * reference.norm()
    assert torch.equal(seen[0.5, 1], seen[0.0, 1])


# --- refusals, storage, presets, controls ----------------------------------------------------------------------------


def test_a_step_without_gradients_ready_is_refused():
    model = shaken()
    optimizer = OPTIMIZERS["sgd"](parameters(model))
    with holdfast.preserve(model, optimizer, [OrthogonalProjection()], retain=tiny.batches(4)) as session:
        model(**tiny.batches(1)[0]).loss.backward()
        before = tiny.trained(model)
        with pytest.raises(WrongSetup, match="gradients_ready"):
            optimizer.step()
        assert all(torch.equal(before[k], v) for k, v in tiny.trained(model).items())
        session.gradients_ready()
        optimizer.step()
    optimizer.step()  # after the context the optimizer is the user's own again


def test_a_session_without_an_optimizer_is_refused():
    model = shaken()
    session = holdfast.Session(model, [OrthogonalProjection()], retain=tiny.batches(4))
    with pytest.raises(WrongSetup, match=r"session\.watch"):
        session.gradients_ready()
    session.close()


@pytest.mark.parametrize("storage", ["bfloat16", "host"])
def test_storage_changes_memory_and_little_else(storage):
    exact, _ = steps([OrthogonalProjection(rank=4)], "adamw")
    other, metrics = steps([OrthogonalProjection(rank=4, storage=storage)], "adamw")
    assert runs.difference(tiny.trained(other), tiny.trained(exact)) <= (1e-3 if storage == "bfloat16" else 0.0)
    assert metrics["holdfast/orthogonal_projection/leakage"] <= 1e-6  # of the basis as it is stored


def test_bfloat16_adapters_keep_float32_dots():
    """QLoRA-style: parameters and gradients in bfloat16, basis and products in float32."""
    model = shaken().to(torch.bfloat16)
    optimizer = torch.optim.AdamW(parameters(model), lr=1e-2)
    with holdfast.preserve(model, optimizer, [OrthogonalProjection(rank=4)], retain=tiny.batches(4)) as session:
        for batch in tiny.batches(3, size=4, seed=9):
            model(**batch).loss.backward()
            session.gradients_ready()
            optimizer.step()
            optimizer.zero_grad()
        state, metrics = session._states[0], session.pop_metrics()
    assert state["basis"].dtype == torch.float32
    assert state["coordinates"].dtype == torch.float64
    assert metrics["holdfast/orthogonal_projection/leakage"] <= 1e-2  # what rounding the weights to 8 bits leaves


def test_an_explained_run_says_what_is_corrected_and_what_it_costs():
    model = shaken()
    optimizer = OPTIMIZERS["sgd"](parameters(model))
    with holdfast.preserve(model, optimizer, [OrthogonalProjection(rank=4)], retain=tiny.batches(4)) as session:
        assert "refreshed every 5 steps, state about 58.0 KiB" in session.explain()  # before it is made
        session.gradients_ready()
        text = session.explain()
    count = sum(p.numel() for p in parameters(model))
    assert "update corrected: orthogonal_projection" in text
    size = 4 * count * 4 + 4 * 4 * 8 + 8 + 8 + 8  # basis; coordinates, losses, split half, step of birth
    assert f"state {size / 1024:.1f} KiB" in text
    assert text.index("optimizer step") < text.index("update corrected")


def test_one_sided_needs_scipy(monkeypatch):
    monkeypatch.setattr(subspace_method, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install scipy"):
        OrthogonalProjection(sides="one")
    OrthogonalProjection(sides="two")


def test_all_faults_of_a_configuration_at_once():
    with pytest.raises(ConfigError) as caught:
        OrthogonalProjection(
            strength=2.0, apply_to="both", metric="optimizer", scope="model", sides="three", rank=40, samples=0,
            rolling=1.5, references="text", repair=1.0, beta=0.0, leak=0.5, storage="disk",
        )  # fmt: skip
    text = str(caught.value)
    words = ("strength", "apply_to", "metric=", "scope", "sides", "rank", "samples", "rolling", "references", "repair")
    assert all(word in text for word in (*words, "beta", "leak", "storage"))


def test_presets():
    [paper], [code] = ogpsa(), ogpsa(official=True, stage="dpo", leak=0.25)
    assert (paper.apply_to, paper.scope, paper.rank, paper.samples, paper.refresh_every) == (
        "gradient",
        "global",
        None,
        200,
        30,
    )
    assert (code.scope, code.references, code.leak, code.refresh_every) == ("tensor", "chosen_and_rejected", 0.25, 5)
    assert ogpsa(exact=True) == [OrthogonalProjection()]
    with pytest.raises(ValueError, match="choose one"):
        ogpsa(exact=True, official=True)


def test_the_random_control_removes_k_directions_and_no_more():
    _, metrics = steps([RandomSubspace(rank=16)], "adamw", kind="dense")
    count = sum(p.numel() for p in parameters(shaken("dense")))
    assert metrics["holdfast/random_subspace/removed"] == pytest.approx(16 / count, rel=0.8)
    assert metrics["holdfast/random_subspace/leakage"] <= 1e-6


def test_pcgrad_by_hand():
    """One task and one retain gradient in conflict: each loses its part along the other, then they are added."""
    model, retain = shaken().eval(), tiny.batches(1, seed=4)
    optimizer = torch.optim.SGD(parameters(model), lr=0.0)
    [other] = retain_gradients(model, retain)
    for sign in (1.0, -1.0):
        noise = (
            0.1 * other.norm() * torch.randn(len(other), generator=torch.Generator().manual_seed(1)) / len(other) ** 0.5
        )
        task = sign * other + noise
        with holdfast.preserve(model, optimizer, [PCGrad()], retain=retain) as session:
            pieces = named.views(task, dict(enumerate(parameters(model))))
            for i, p in enumerate(parameters(model)):
                p.grad = pieces[i].clone()
            session.gradients_ready()
        got = torch.cat([p.grad.flatten() for p in parameters(model)])
        if sign > 0:
            expected = task + other
        else:
            dot = task @ other
            expected = (task - dot / (other @ other) * other) + (other - dot / (task @ task) * task)
        assert (got - expected).norm() <= 1e-4 * other.norm()


def test_agem_on_the_update():
    seen = []

    def watch(number, rows, update):
        seen.append(float((rows[number].double() @ update) / (rows[number].double().norm() * update.norm())))

    _, metrics = steps([AGEM(apply_to="update")], "adamw with decay", watch=watch)
    assert min(seen) >= -1e-6
    assert metrics["holdfast/agem/leakage"] <= 1e-6


# --- together with others, saved and resumed -------------------------------------------------------------------------


def test_a_projection_covers_what_penalties_push():
    seen = []
    methods = [OrthogonalProjection(rank=4, refresh_every=1), L2SP(strength=5.0)]
    steps(methods, "adamw with decay", watch=lambda n, g, d: seen.append(worst_cosine(g, d)))
    assert max(seen) <= 1e-6


@pytest.mark.parametrize(
    "settings",
    [{}, {"refresh_every": "auto"}, {"rolling": 0.5, "refresh_every": 2}, {"repair": 0.1}, {"storage": "bfloat16"}],
    ids=str,
)
def test_resumed_is_bit_identical_to_uninterrupted(settings, tmp_path):
    """Basis, its age, the next refresh and the place in the retain data survive, under AdamW."""
    method = OrthogonalProjection(rank=4, samples=4, **settings)
    batches = tiny.batches(9, size=4, seed=9)

    def run(model, optimizer, rows, folder=None, load=False):
        with holdfast.preserve(model, optimizer, [method], retain=tiny.batches(6)) as session:
            if load:
                session.load(tmp_path)
            for number, batch in enumerate(rows):
                model(**batch).loss.backward()
                session.gradients_ready()
                optimizer.step()
                optimizer.zero_grad()
                if folder and number == 3:
                    session.save(folder)
                    torch.save((model.state_dict(), optimizer.state_dict()), folder / "host.pt")
        return model

    whole = shaken().eval()
    run(whole, OPTIMIZERS["adamw with decay"](parameters(whole)), batches, tmp_path)
    resumed = shaken().eval()
    optimizer = OPTIMIZERS["adamw with decay"](parameters(resumed))
    weights, state = torch.load(tmp_path / "host.pt")
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(copy.deepcopy(state))
    run(resumed, optimizer, batches[4:], load=True)
    assert runs.identical(resumed, whole)


@pytest.mark.parametrize("host", ["sft", "dpo", "trainer"])
def test_on_the_trainers(host):
    """The update is corrected inside a real trainer, whose optimizer does not exist at attach."""
    trainer = runs.train(host, [OrthogonalProjection(rank=4)], steps=4, weight_decay=0.1)
    logged = [e["holdfast/orthogonal_projection/leakage"] for e in trainer.state.log_history if "loss" in e]
    assert len(logged) == 4
    assert max(logged) <= 1e-6
    assert all(e["holdfast/orthogonal_projection/age"] <= 3 for e in trainer.state.log_history if "loss" in e)
    holdfast.detach(trainer)
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"packing": True, "max_length": 32},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_under_the_trainers_options(options):
    trainer = runs.train("sft", [OrthogonalProjection(rank=4)], steps=3, weight_decay=0.1, **options)
    logged = [e["holdfast/orthogonal_projection/leakage"] for e in trainer.state.log_history if "loss" in e]
    assert len(logged) == 3
    assert max(logged) <= 1e-6


def test_in_a_loop_under_autocast_products_stay_exact():
    seen = []
    model = shaken().eval()
    optimizer = OPTIMIZERS["adamw"](parameters(model))
    method = OrthogonalProjection(rank=4, refresh_every=1)
    with holdfast.preserve(model, optimizer, [method], retain=tiny.batches(4)) as session:
        for batch in tiny.batches(2, size=4, seed=9):
            rows = retain_gradients(model, tiny.batches(4))
            before = torch.cat([p.detach().flatten() for p in parameters(model)]).double()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(**batch).loss.backward()
                session.gradients_ready()
                optimizer.step()
            optimizer.zero_grad()
            after = torch.cat([p.detach().flatten() for p in parameters(model)]).double()
            seen.append(worst_cosine(rows, before - after))
    assert max(seen) <= 1e-6


def test_a_gradient_scaler_skips_overflows_and_nothing_else():
    """fp16: the scaler skips the step with infinite gradients, and the next one is corrected as ever."""
    model = shaken().eval()
    optimizer = OPTIMIZERS["adamw with decay"](parameters(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    method = OrthogonalProjection(rank=4, refresh_every=1)
    seen = []
    with holdfast.preserve(model, optimizer, [method], retain=tiny.batches(4)) as session:
        for number, batch in enumerate(tiny.batches(4, size=4, seed=9)):
            rows = retain_gradients(model, tiny.batches(4))
            before = torch.cat([p.detach().flatten() for p in parameters(model)]).double()
            scaler.scale(model(**batch).loss).backward()
            if number == 1:
                parameters(model)[0].grad[0] = float("inf")
            session.gradients_ready(scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            update = before - torch.cat([p.detach().flatten() for p in parameters(model)]).double()
            if number == 1:
                assert not update.any()
            else:
                seen.append(worst_cosine(rows, update))
    assert len(seen) == 3
    assert max(seen) <= 1e-6


def test_one_flat_parameter_is_not_mistaken_for_its_copy():
    """The weights before a step are a copy, also where a single vector is all that is trained."""
    model = tiny.llama().eval()
    for name, p in model.named_parameters():
        p.requires_grad_(name == "model.norm.weight")
    seen = []
    optimizer = OPTIMIZERS["adamw"](parameters(model))
    method = OrthogonalProjection(rank=2, refresh_every=1)
    with holdfast.preserve(model, optimizer, [method], retain=tiny.batches(4)) as session:
        model(**tiny.batches(1, seed=9)[0]).loss.backward()
        before = parameters(model)[0].detach().clone()
        session.gradients_ready()
        optimizer.step()
        seen = session.pop_metrics()
        assert not torch.equal(parameters(model)[0], before)
    assert seen["holdfast/orthogonal_projection/removed"] > 0
    assert seen["holdfast/orthogonal_projection/leakage"] <= 1e-6


def test_an_optimizer_that_steps_in_the_backward_pass_is_refused():
    class Lomo(torch.optim.SGD):
        pass

    model = shaken()
    refused = pytest.raises(NeverSupported, match="inside the backward pass")
    with refused, holdfast.preserve(model, Lomo(parameters(model)), [OrthogonalProjection()], retain=tiny.batches(2)):
        pass


@pytest.mark.parametrize("method", [OrthogonalProjection(rank=4), OrthogonalProjection(rank=4, apply_to="gradient")])
def test_how_a_step_is_split_makes_no_difference(method):
    whole, _ = runs.loop([method], split=1, optimizer=None)
    for split in (2, 4):
        parts, _ = runs.loop([method], split=split)
        assert runs.difference(tiny.trained(parts), tiny.trained(whole)) <= 1e-5


@pytest.mark.parametrize(("rank", "sets", "expected"), [(3, 2, 2), (4, 2, 4), (5, 2, 4), (1, 1, 1), (2, 1, 2)])
def test_there_are_never_more_references_than_the_rank(rank, sets, expected):
    """A set's share of the rank is one mean, or at least two groups."""
    retain = {str(i): tiny.batches(4, seed=i) for i in range(sets)}
    model = shaken().eval()
    sgd = OPTIMIZERS["sgd"](parameters(model))
    with holdfast.preserve(model, sgd, [OrthogonalProjection(rank=rank)], retain=retain) as session:
        session.gradients_ready()
        assert session._states[0]["basis"].shape[0] == expected
