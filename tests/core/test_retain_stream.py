"""The retain stream against slow sums in float64, one sequence at a time, and however a step is split."""

import holdfast
import pytest
import torch
from holdfast.core.errors import ConfigError, WrongSetup
from holdfast.core.retain import STREAM, Retain, sequences_of
from holdfast.core.stream import beside
from holdfast.core.types import TokenCounts
from holdfast.methods import AGEM, FullKL, SelfReplay, TargetMaskedKL

import runs
import tiny

BAR = 1e-10


def student(kind="lora", **changes):
    model = tiny.llama(**changes)
    return (tiny.lora(model) if kind == "lora" else model).double().train()


def rows(n, size=12, seed=9):
    return tiny.batches(n, size=size, seed=seed)


def split(batch, sizes):
    parts = {key: value.split(sizes) for key, value in batch.items()}
    return [{key: parts[key][i] for key in parts} for i in range(len(sizes))]


def session_of(model, methods, retain=None, **options):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    retain = tiny.batches(15, seed=4) if retain is None else retain
    return holdfast.preserve(model, optimizer, methods, retain=retain, **options)


def added(session, model, micro_batches):
    """Value and gradient of what the session adds to one step."""
    model.zero_grad()
    counts, total = session.count(micro_batches), 0.0
    for batch in micro_batches:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        loss = session.loss(batch, counts)
        if loss.requires_grad:
            loss.backward()
        total += loss.item()
    session.gradients_ready()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def of_one(batch, row):
    """The tokens of a row, by hand."""
    return batch["input_ids"][row][batch["attention_mask"][row] == 1]


def slow(model, base, sequences, divergence):
    """The mean over tokens, one sequence at a time, from whole logits; `base` gives those of the base."""
    total, tokens = 0.0, 0
    for ids in sequences:
        ours, theirs = model(input_ids=ids[None]).logits[0, :-1], base(ids[None])[0, :-1]
        total = total + divergence(theirs.log_softmax(-1), ours.log_softmax(-1), ids[1:])
        tokens += len(ids) - 1
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(total / tokens, list(params.values()), allow_unused=True)
    return (total / tokens).item(), {n: g for n, g in zip(params, gradients, strict=True) if g is not None}


def full(base, ours, targets):
    return (base.exp() * (base - ours)).sum()


def masked(base, ours, targets):
    keep = torch.ones_like(base, dtype=torch.bool).scatter(1, targets[:, None], False)
    base, ours = (x[keep].view(len(x), -1).log_softmax(-1) for x in (base, ours))
    return (base.exp() * (base - ours)).sum()


@pytest.mark.parametrize("kind", ["lora", "dense"])
@pytest.mark.parametrize(
    ("method", "divergence"),
    [
        (SelfReplay(), full),
        (SelfReplay(cache=False), full),
        (FullKL(on="retain", strength=1.0, positions="all"), full),
        (TargetMaskedKL(on="retain"), masked),
    ],
)
def test_value_and_gradient_are_those_of_the_slow_sum(kind, method, divergence):
    """12 task rows and a share of 1/4 take 4 retain sequences: here the whole pool, so its order does not matter."""
    model, base = student(kind), student("dense").eval().requires_grad_(False)
    retain = tiny.batches(2, size=2, seed=4)
    with session_of(model, [method], retain) as session:
        tiny.shake(model)
        value, gradient = added(session, model, rows(1))
    sequences = [of_one(batch, row) for batch in retain for row in range(2)]
    expected, its_gradient = slow(model, lambda ids: base(input_ids=ids).logits, sequences, divergence)
    assert expected > 1e-3
    assert value == pytest.approx(expected, rel=BAR)
    assert runs.difference(gradient, its_gradient) <= BAR


def test_at_the_start_what_is_kept_is_the_base_to_rounding():
    """In float32, where the base at hand gives exactly 0: a step of 12 + 4 sequences adds less than a millionth."""
    model = tiny.lora(tiny.llama()).train()
    with session_of(model, [SelfReplay()]) as session:
        (value, nothing), _ = added(session, model, rows(1)), tiny.shake(model)
        _, gradient = added(session, model, rows(1))
    norm, later = (torch.cat([g.flatten() for g in each.values()]).norm() for each in (nothing, gradient))
    assert abs(value) < 1e-6
    assert 0 <= norm < 1e-5 * later


SPLITS = [[12], [6, 6], [4, 4, 4], [1] * 12, [5, 7], [1, 11], [11, 1]]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.04])
def test_the_split_of_a_step_changes_nothing(share):
    """Three steps of 4, 12 or 1 retain sequences, the task's own loss among them: same values, same gradients."""
    found = []
    for sizes in SPLITS:
        model = student()
        methods = [SelfReplay(share=share), TargetMaskedKL(strength=0.5, positions="all")]
        with session_of(model, methods) as session:
            tiny.shake(model)
            found.append([added(session, model, split(batch, sizes)) for batch in rows(3)])
            assert session.retain.positions[STREAM] == 3 * beside(12, share)
    for other in found[1:]:
        for (value, gradient), (expected, its_gradient) in zip(other, found[0], strict=True):
            assert value == pytest.approx(expected, rel=BAR)
            assert runs.difference(gradient, its_gradient) <= BAR
    assert found[0][0][0] != pytest.approx(found[0][1][0], rel=1e-3)  # another step reads other sequences


def test_a_share_of_the_sequences():
    assert [beside(n, 0.25) for n in (1, 2, 4, 5, 12, 24)] == [1, 1, 1, 2, 4, 8]
    assert [beside(n, 0.5) for n in (1, 2, 7)] == [1, 2, 7]


def test_sequences_are_counted_as_the_host_counts_examples():
    row = torch.tensor([[5, 6, 7, 8, 9, 0, 0]])
    packed = {"input_ids": row, "labels": row, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 0]])}
    left = {"input_ids": row, "labels": row, "position_ids": torch.tensor([[0, 0, 0, 0, 1, 2, 3]])}
    pairs = {"input_ids": row.repeat(6, 1), "completion_mask": torch.ones(6, 7)}
    plain = rows(1, size=5)[0]
    counts = [TokenCounts.of(batches) for batches in ([packed], [left], [pairs], [plain], [packed, pairs, plain])]
    assert [each.sequences for each in counts] == [2, 1, 3, 5, 10]
    assert [each.micro_batches for each in counts] == [1, 1, 1, 1, 3]


def test_a_pool_is_read_as_sequences_without_padding():
    ids = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8]])
    right = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids}
    left = {"input_ids": ids.flip(1), "attention_mask": (ids.flip(1) > 0).long()}
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert [each.tolist() for each in sequences_of(right)] == [[1, 2, 3], [5, 6, 7, 8]]
    assert [each.tolist() for each in sequences_of(left)] == [[3, 2, 1], [8, 7, 6, 5]]
    pairs = {"input_ids": torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]]), "completion_mask": torch.ones(4, 2)}
    assert [each.tolist() for each in sequences_of(pairs)] == [[1, 2], [3, 4]]  # the chosen ones


def test_every_pass_reads_every_sequence_once_in_an_order_of_its_own():
    retain = Retain({"a": tiny.batches(3), "b": tiny.batches(2, seed=8)})

    def drawn(n, of=retain):
        pool = of.sequences()
        return [tuple(pool[place].tolist()) for place in of.places(n, len(pool), seed=1)]

    whole = sorted(tuple(ids.tolist()) for batches in retain.sets.values() for b in batches for ids in sequences_of(b))
    assert len(whole) == 10
    first, second = drawn(7) + drawn(3), drawn(10)
    assert sorted(first) == sorted(second) == whole
    assert first != second
    assert (retain.positions[STREAM], retain.positions[""], retain.positions["a"]) == (20, 0, 0)
    again = Retain(retain.sets)
    again.positions[STREAM] = 7  # as a checkpoint would
    assert drawn(13, again) == first[7:] + second
    assert len(drawn(25)) == 25  # more than there are: further passes


def test_names_and_pools_that_cannot_be():
    with pytest.raises(WrongSetup, match=r"cannot be called '\*'"):
        Retain({"*": tiny.batches(1)})
    with pytest.raises(WrongSetup, match="two tokens or more"):
        Retain([{"input_ids": torch.tensor([[5]])}]).sequences()


def test_a_method_reads_the_sets_that_it_names():
    sets = {"a": tiny.batches(1, seed=4), "b": tiny.batches(2, seed=8)}
    with session_of(student(), [SelfReplay(data="b")], sets) as session:
        assert "pool of 4," in session.explain()
        named = session.stream.digest
    with session_of(student(), [SelfReplay()], sets["b"]) as session:
        assert session.stream.digest == named
    with session_of(student(), [SelfReplay()], sets) as session:
        assert session.stream.digest != named
    with pytest.raises(WrongSetup, match="no retain set 'c': the sets are 'a', 'b'"):
        session_of(student(), [SelfReplay(data=("b", "c"))], sets).__enter__()
    with pytest.raises(WrongSetup, match="differ in share, data or cache"):
        session_of(student(), [SelfReplay(data="a"), FullKL(on="retain", data="b")], sets).__enter__()


@pytest.mark.parametrize("cache", [False, True])
def test_methods_on_the_stream_share_its_forwards(cache):
    """The student's and the base's; where what the base says is kept, the base runs before the first step alone."""
    model, calls = student(), []
    methods = [SelfReplay(cache=cache), TargetMaskedKL(on="retain", cache=cache), AGEM(refresh_every=9)]
    with session_of(model, methods) as session:
        tiny.shake(model)
        hook = session.tap.backbone.register_forward_hook(
            lambda module, args, kwargs, out: calls.append((torch.is_grad_enabled(), kwargs["input_ids"].shape[0])),
            with_kwargs=True,
        )
        session.begin()  # AGEM's own gradient on retain data is another matter
        found = []
        for batch in rows(2):
            model(**batch)
            calls.clear()
            session.loss(batch).backward()
            session.gradients_ready()
            found.append(list(calls))
        hook.remove()
    assert found[1] == ([(True, 4)] if cache else [(True, 4), (False, 4)])
    assert (found[0] == found[1]) is not cache


@pytest.mark.parametrize(("sizes", "expected"), [([4, 4, 4], [1, 1, 2]), ([2] * 6, [0, 1, 1, 0, 1, 1]), ([12], [4])])
def test_sequences_are_spread_evenly_over_micro_batches(sizes, expected):
    """So that no micro-batch needs much more memory than another; one without a sequence costs no forward."""
    model, found = student(), []
    with session_of(model, [SelfReplay(cache=False)]) as session:
        micro_batches = split(rows(1)[0], sizes)
        counts = session.count(micro_batches)
        for batch in micro_batches:
            calls = []
            model(**batch)
            hook = session.tap.backbone.register_forward_hook(
                lambda module, args, kwargs, out, calls=calls: calls.append(len(kwargs["input_ids"])), with_kwargs=True
            )
            session.loss(batch, counts)
            hook.remove()
            assert calls in ([], [calls[0]] * 2 if calls else [])
            found.append(calls[0] if calls else 0)
    assert found == expected


def test_two_methods_are_the_sum_of_each():
    def alone(methods):
        model = student()
        with session_of(model, methods) as session:
            tiny.shake(model)
            return added(session, model, split(rows(1)[0], [6, 6]))

    a, b = SelfReplay(strength=2.0), TargetMaskedKL(on="retain", strength=0.5)
    (value, gradient), (first, one), (second, two) = alone([a, b]), alone([a]), alone([b])
    assert value == pytest.approx(first + second, rel=BAR)
    # Llama's norms round to float32 on the way back, so a gradient of a sum is a sum of gradients to that only
    assert runs.difference(gradient, {n: one[n] + two[n] for n in one}) <= 1e-6


def test_different_shares_are_refused():
    with (
        pytest.raises(WrongSetup, match="differ in share"),
        session_of(student(), [SelfReplay(), FullKL(on="retain", share=0.5)]),
    ):
        pass


def test_the_hosts_random_numbers_and_its_own_loss_are_left_alone():
    """Dropout draws in the student's retain forward; the host finds its generator as it left it."""
    model = tiny.lora(tiny.llama(attention_dropout=0.2), lora_dropout=0.2).double().train()
    with session_of(model, [SelfReplay()]) as session:
        tiny.shake(model)
        batch = rows(1)[0]
        model(**batch)
        before = torch.get_rng_state()
        first = session.loss(batch)
        assert torch.equal(torch.get_rng_state(), before)
        session.gradients_ready()
        session.retain.positions[STREAM] = 0
        model(**batch)
        second = session.loss(batch)
    assert first.item() != second.item()  # the same sequences: dropout is on, and another one in each step


@pytest.mark.parametrize("kind", ["lora", "dense"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind, reentrant):
    found = []
    for checkpointing in (False, True):
        model = student(kind)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with session_of(model, [SelfReplay(), FullKL()]) as session:
            tiny.shake(model)
            found.append(added(session, model, split(rows(1)[0], [4, 8])))
    assert found[1][0] == pytest.approx(found[0][0], rel=BAR)
    assert runs.difference(found[1][1], found[0][1]) <= BAR


@pytest.mark.parametrize("cache", [False, True])
def test_the_hosts_precision_is_repeated(cache):
    """The host autocasts its forward alone; student and reference run on retain sequences as it ran on the task's."""
    model, dtypes = tiny.lora(tiny.llama()).train(), []
    with session_of(model, [SelfReplay(cache=cache)]) as session:
        tiny.shake(model)
        layer = session.tap.backbone.layers[0].mlp.down_proj
        hook = layer.register_forward_hook(lambda module, args, out: dtypes.append((out.dtype, len(out))))
        batch = rows(1)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        session.loss(batch).backward()
        hook.remove()
    assert {dtype for dtype, _ in dtypes} == {torch.bfloat16}
    assert [size for _, size in dtypes][: 1 if cache else None] == ([12] if cache else [12, 4, 4])
    assert sum(size for _, size in dtypes) == 12 + 4 + (1 + 30 if cache else 4)  # once over the pool, and one to look


def test_micro_batches_that_were_not_counted_are_refused():
    model = student()
    with session_of(model, [SelfReplay()]) as session:
        first, second = split(rows(1)[0], [6, 6])
        counts = session.count([first])
        model(**first)
        session.loss(first, counts)
        model(**second)
        with pytest.raises(WrongSetup, match=r"ran 2 times .* saw 1"):
            session.loss(second, counts)
    with session_of(model, [SelfReplay()]) as session:
        counts = session.count([first, second])
        model(**first)
        session.loss(first, counts)
        with pytest.raises(WrongSetup, match="saw 1 more micro-batches"):
            session.gradients_ready()


def test_the_position_is_saved_and_resumed(tmp_path):
    """Dense weights and a third step: the resumed session reads the sequences that the whole run would have read."""
    batches = rows(3)

    def steps(session, model, some):
        return [added(session, model, split(batch, [4, 8])) for batch in some]

    model = student()
    with session_of(model, [SelfReplay()]) as session:
        tiny.shake(model)
        steps(session, model, batches[:2])
        session.save(tmp_path)
        ((value, gradient),) = steps(session, model, batches[2:])
    resumed = student()
    with session_of(resumed, [SelfReplay()]) as session:
        session.load(tmp_path)
        tiny.shake(resumed)
        assert session.retain.positions[STREAM] == 8
        ((ours, its_gradient),) = steps(session, resumed, batches[2:])
    assert ours == value
    assert all(torch.equal(its_gradient[n], gradient[n]) for n in gradient)


def test_settings_that_mean_nothing():
    with pytest.raises(ConfigError) as caught:
        FullKL(on="retain", positions="prompt", share=1.0)
    assert len(caught.value.faults) == 2
    with pytest.raises(ConfigError, match="on must be one of task, retain, got 'both'"):
        TargetMaskedKL(on="both")
    with pytest.raises(ConfigError, match="share=0.5 is of retain sequences"):
        FullKL(share=0.5)
    with pytest.raises(ConfigError, match="full_kl"):
        SelfReplay(on="task")
    with pytest.raises(ConfigError) as caught:
        FullKL(data="text", cache=False)
    assert [fault.split("=")[0] for fault in caught.value.faults] == ["data", "cache"]
    with pytest.raises(ConfigError, match="cache must be true or false, got 'no'"):
        SelfReplay(cache="no")
    assert SelfReplay(positions="all").positions == "all"


def test_what_needs_retain_data():
    """Of a configuration, and on the class what its defaults need (`holdfast methods` shows it)."""
    assert [m.uses_retain for m in (FullKL(), FullKL(on="retain"), SelfReplay())] == [False, True, True]
    assert [c.uses_retain for c in (FullKL, TargetMaskedKL, SelfReplay)] == [False, False, True]
    assert [c.samples_pool for c in (FullKL, SelfReplay)] == [False, True]
    with pytest.raises(WrongSetup, match="full_kl needs retain data"), session_of(student(), [FullKL(on="retain")], ()):
        pass
    with session_of(student(), [FullKL(on="retain", strength=0), SelfReplay(strength=0)], ()) as session:
        assert session.stream is None


def test_explain_tells_of_the_stream():
    with session_of(student(), [SelfReplay()]) as session:
        assert "runs once, before the first step, and what it says is kept" in session.explain()
        batch = rows(1)[0]
        session.model(**batch)
        session.loss(batch)
        assert "read from exact statistics of the KL at " in session.explain()
    with session_of(student(), [SelfReplay(cache=False)]) as session:
        text = session.explain()
    assert "25% of a step's sequences come from the pool of 30" in text
    places = [
        text.index(word)
        for word in ("forward: the host", "retain stream", "reference forward on the retain", "loss: self_replay")
    ]
    assert places == sorted(places)
    assert text.count("reference forward") == 1  # none on the task
    with session_of(student(), [TargetMaskedKL()]) as session:
        assert "retain stream" not in session.explain()
