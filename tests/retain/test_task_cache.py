"""The base is kept on the task's own sequences: the same loss as with it, no base the second time."""

from itertools import pairwise

import holdfast
import pytest
import torch
from holdfast.methods import FullKL, SelfReplay, TargetMaskedKL
from holdfast.retain.task_folder import contents, manifest
from safetensors.torch import load_file

import families
import tiny
from task_runs import assert_same, kept, packed, padded, rows_of, run, tuned

# -- the same loss

METHODS = {
    "masked": TargetMaskedKL(strength=2.0),
    "masked, everywhere": TargetMaskedKL(strength=2.0, positions="all"),
    "masked, gamma": TargetMaskedKL(gamma=1.5),
    "masked, exclusion": TargetMaskedKL(exclusion=0.97),
    "full, prompt": FullKL(strength=3.0, positions="prompt"),
    "reverse": TargetMaskedKL(direction="reverse"),
    "js": FullKL(strength=9.0, direction="js"),
}


@pytest.mark.parametrize("name", METHODS)
def test_equals_the_live_base_in_float64(name, tmp_path):
    """While it is made, and when it is read: every member of the family, by statistics or by hidden states."""
    batches, method = tiny.batches(3), METHODS[name]
    model = tuned(dtype=torch.float64)
    live, ran, _ = run(model, [method], batches)
    assert ran == 3
    made, ran, session = run(model, [method], batches, cache=tmp_path)
    assert (ran, session.logged["holdfast/cache/base_ran_for_tokens"] > 1) == (3, True)
    read, ran, session = run(model, [method], batches, cache=tmp_path)
    assert (ran, session.logged["holdfast/cache/base_ran_for_tokens"]) == (0, 0)
    for found in (made, read):
        assert_same(found, live, 1e-9)
    (kind,) = contents(tmp_path, manifest(tmp_path))
    assert kind.name.endswith("-hidden") == (name in ("reverse", "js"))
    numbers = 0 if kind.name.endswith("-hidden") else 2 if name in ("masked, gamma", "masked, exclusion") else 1
    assert f"{kind.name} {32 * 8 + 8 * numbers:,} bytes a supervised token" in session.told
    (file,) = (tmp_path / kind.name).glob("*.safetensors")
    tensors = load_file(file)
    per_token = sum(t[0].numel() * t.itemsize for n, t in tensors.items() if n in ("values", "constants", "weights"))
    assert per_token == 32 * 8 + 8 * numbers
    if name == "masked, exclusion":  # it leaves some out, so that the weights are tried
        assert 0 < (tensors["weights"] == 0).sum() < len(tensors["weights"])


@pytest.mark.parametrize(("dtype", "rtol", "size"), [("float32", 3e-4, 4), ("float16", 3e-2, 2)])
def test_float32_and_float16_against_float64(dtype, rtol, size, tmp_path):
    batches, method = tiny.batches(3), TargetMaskedKL(strength=2.0)
    exact, _, _ = run(tuned().double(), [method], batches)
    model = tuned()
    wide = [(loss.float(), gradient.float()) for loss, gradient in exact]
    for _ in range(2):
        found, _, _ = run(model, [method], batches, cache={"folder": tmp_path, "dtype": dtype})
        assert_same(found, wide, rtol)
    (file,) = tmp_path.glob("*/*.safetensors")
    assert load_file(file)["values"].itemsize == size
    errors = [((a - b).norm() / b.norm()).item() for (_, a), (_, b) in zip(found, wide, strict=True)]
    assert max(errors) > 1e-8  # the dtype does show


def test_statistics_of_a_bfloat16_model_are_in_float32(tmp_path):
    model, batches = tuned(dtype=torch.bfloat16), tiny.batches(2)
    live, _, _ = run(model, [TargetMaskedKL(strength=50.0)], batches)
    found, _, _ = run(model, [TargetMaskedKL(strength=50.0)], batches, cache=tmp_path)
    assert_same(found, live, 0.1)  # the live form rounds its products to bfloat16
    (file,) = tmp_path.glob("*/*.safetensors")
    assert load_file(file)["values"].dtype == torch.float32


@pytest.mark.parametrize("family", ["phi, head with bias", "cohere, logit scale", "gpt2"])
def test_heads_with_bias_and_scale(family, tmp_path):
    model, batches = tuned(families.build(family), dtype=torch.float64), tiny.batches(2)
    for method in (TargetMaskedKL(strength=20.0, gamma=1.0), FullKL(strength=20.0)):
        live, _, _ = run(model, [method], batches)
        for _ in range(2):
            assert_same(run(model, [method], batches, cache=tmp_path / method.name)[0], live, 1e-8)


def test_what_is_not_linear_says_so_and_keeps_hidden_states(tmp_path, caplog):
    batches = tiny.batches(2)
    capped = tuned(families.build("gemma2, soft-cap"))
    trained = tuned(modules_to_save=["lm_head"])
    for i, (model, why) in enumerate([(capped, "soft cap (3.0)"), (trained, "the head is trained")]):
        caplog.clear()
        live, _, _ = run(model, [TargetMaskedKL(strength=9.0)], batches)
        for _ in range(2):
            found, ran, session = run(model, [TargetMaskedKL(strength=9.0)], batches, cache=tmp_path / str(i))
            assert_same(found, live, 1e-4)
        assert ran == 0
        assert "completion-hidden" in session.told
        told = [record.message for record in caplog.records if "hidden states are kept" in record.message]
        assert len(told) == 2  # once a run
        assert why in told[0]


def test_what_cannot_be_kept_runs_the_base_and_says_so(tmp_path, caplog):
    kept = TargetMaskedKL(exclusion=0.5, normalise="kept")
    batches = tiny.batches(2)
    found, ran, session = run(tuned(), [kept, FullKL()], batches, cache=tmp_path)
    assert ran == 2
    assert_same(found, run(tuned(), [kept, FullKL()], batches)[0], 1e-7)
    assert "target_masked_kl asks more of the base" in caplog.text
    assert "nothing is kept of the base on the task: target_masked_kl asks more" in session.told
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    assert session.logged["holdfast/cache/base_ran_for_tokens"] == tokens / 2  # a step, on the average
    assert not list(tmp_path.iterdir())
    caplog.clear()
    run(tuned(), [SelfReplay()], batches, cache=True, retain=tiny.batches(3))
    assert "cache=True does nothing here" in caplog.text


def test_two_methods_have_an_entry_each(tmp_path):
    batches, methods = tiny.batches(3), [TargetMaskedKL(), FullKL(positions="prompt"), TargetMaskedKL(strength=0.1)]
    live, _, _ = run(tuned(), methods, batches)
    for expected in (3, 0):
        found, ran, session = run(tuned(), methods, batches, cache=tmp_path)
        assert ran == expected
        assert_same(found, live, 1e-4)
    assert {kind.name for kind in contents(tmp_path, manifest(tmp_path))} == {"completion-target", "prompt-none"}
    assert "completion-target 136 bytes a supervised token, prompt-none 136 bytes" in session.told


def test_a_share_of_the_sequences(tmp_path):
    batches, method = tiny.batches(6, size=4), TargetMaskedKL(reference_share=0.5)
    live, _, _ = run(tuned(), [method], batches)
    found, _, _ = run(tuned(), [method], batches, cache=tmp_path)
    assert_same(found, live, 1e-4)
    (kind,) = contents(tmp_path, manifest(tmp_path))
    assert kind.sequences == 12  # of 24
    again, ran, _ = run(tuned(), [method], batches, cache=tmp_path)
    assert ran == 0
    assert_same(again, live, 1e-4)


def test_a_micro_batch_of_which_no_sequence_was_drawn_is_no_news(tmp_path, caplog):
    """Where rows cannot be told apart (lengths of packed documents), one row is drawn or it is not."""
    rows, method = rows_of(tiny.batches(4)), TargetMaskedKL(reference_share=0.5)
    batches = [packed(rows[i : i + 2]) | {"cu_seq_lens_q": torch.tensor([0, 1])} for i in range(6)]
    live, expected, _ = run(tuned(), [method], batches)
    assert 0 < expected < 6
    found, ran, _ = run(tuned(), [method], batches, cache=tmp_path)
    assert ran == expected + 1  # and a document alone
    assert "not kept" not in caplog.text
    for (loss, gradient), (theirs, slow) in zip(found, live, strict=True):
        torch.testing.assert_close(loss, theirs, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradient, slow, rtol=1e-3, atol=1e-5)


def test_hidden_states_are_as_the_model_makes_them_and_so_is_what_is_said(tmp_path, caplog):
    batches, method = tiny.batches(2), TargetMaskedKL(direction="reverse")
    for name, dtype in (("bfloat16", "float32"), ("float32", "float16"), ("bfloat16", None)):
        caplog.clear()
        folder = tmp_path / f"{name} {dtype}"
        size = getattr(torch, name).itemsize
        before, _ = kept(folder, [method], tuned(dtype=getattr(torch, name)))
        assert f"completion-hidden {32 * size} bytes a supervised token" in before.describe()
        for _ in range(2):
            cache = {"folder": folder} | ({"dtype": dtype} if dtype else {})
            _, _, session = run(tuned(dtype=getattr(torch, name)), [method], batches, cache=cache)
            assert f"completion-hidden {32 * size} bytes a supervised token" in session.told
        (file,) = folder.glob("*/*.safetensors")
        assert load_file(file)["values"].itemsize == size
        assert caplog.text.count(f"dtype={dtype} is of statistics alone") == (2 if dtype else 0)  # once a run


def test_what_float16_cannot_hold_is_kept_in_float32(tmp_path, caplog):
    model = tiny.llama()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-6)
        model.model.norm.weight.mul_(1e6)
    model, batches = tuned(model), tiny.batches(2)
    live, _, _ = run(model, [TargetMaskedKL(strength=9.0)], batches)
    for told in (1, 0):  # once a run, however many micro-batches
        caplog.clear()
        found, _, session = run(
            model, [TargetMaskedKL(strength=9.0)], batches, cache={"folder": tmp_path, "dtype": "float16"}
        )
        assert_same(found, live, 1e-3)
        assert caplog.text.count("do not fit float16") == told
        assert "completion-target 136 bytes a supervised token" in session.told
    (file,) = tmp_path.glob("*/*.safetensors")
    assert load_file(file)["values"].dtype == torch.float32


def test_dropout_is_not_in_it(tmp_path):
    def model():
        return tuned(tiny.llama(attention_dropout=0.3), lora_dropout=0.3)

    run(model(), [TargetMaskedKL()], tiny.batches(2), cache=tmp_path / "dropout")
    run(tuned(), [TargetMaskedKL()], tiny.batches(2), cache=tmp_path / "none")
    with_it, without = (load_file(next((tmp_path / name).glob("*/*.safetensors"))) for name in ("dropout", "none"))
    assert torch.equal(with_it["values"], without["values"])
    assert torch.equal(with_it["constants"], without["constants"])


# -- wherever a sequence comes


def test_order_batch_size_and_padding_do_not_matter(tmp_path):
    rows, method = rows_of(tiny.batches(4)), TargetMaskedKL(strength=2.0)
    run(tuned(), [method], [padded(rows[i : i + 2]) for i in range(0, 8, 2)], cache=tmp_path)
    other = [padded([rows[i] for i in some], extra=2) for some in ([7, 0, 3], [2], [1, 6, 4, 5])]
    found, ran, _ = run(tuned(), [method], other, cache=tmp_path)
    assert ran == 0
    assert_same(found, run(tuned(), [method], other)[0], 1e-4)


def test_packed_documents_are_known_one_by_one(tmp_path):
    rows, method = rows_of(tiny.batches(4)), TargetMaskedKL(strength=2.0)
    run(tuned(), [method], [packed(rows[:5]), packed(rows[5:])], cache=tmp_path)
    other = [packed([rows[i] for i in some]) for some in ([7, 0, 3, 4], [2, 1], [6, 5])] + [padded(rows[2:4])]
    found, ran, session = run(tuned(), [method], other, cache=tmp_path)
    assert ran == 2  # to prove on the first row that they are kept apart: the row, and a document alone
    assert session.logged["holdfast/cache/base_ran_for_tokens"] == 0
    assert_same(found, run(tuned(), [method], other)[0], 1e-4)


def test_documents_that_see_each_other_are_kept_as_rows(tmp_path, caplog):
    """With a mask, transformers does not look at where positions begin anew: then neighbours are in the answer."""
    rows, method = rows_of(tiny.batches(3)), TargetMaskedKL(strength=2.0)
    first, other = packed(rows[:3], mask=True), packed([rows[1], rows[0], rows[2]], mask=True)
    live = [run(tuned(), [method], [batch])[0] for batch in (first, other)]
    run(tuned(), [method], [first], cache=tmp_path)
    assert "see each other" in caplog.text
    for batch, expected, missed in ((first, live[0], False), (other, live[1], True), (other, live[1], False)):
        found, _, session = run(tuned(), [method], [batch], cache=tmp_path)
        assert (session.logged["holdfast/cache/base_ran_for_tokens"] > 0) == missed
        assert_same(found, expected, 1e-4)


def test_other_inputs_run_the_base_and_say_so(tmp_path, caplog):
    method, batch = TargetMaskedKL(strength=2.0), tiny.batches(1)[0]
    left = {name: value.flip(1) for name, value in batch.items()}
    left["labels"] = left["labels"].masked_fill(left["attention_mask"].cumsum(1) <= 1, -100)
    assert (left["attention_mask"][:, 0] == 0).any()
    found, ran, session = run(tuned(), [method], [left], cache=tmp_path / "left")
    assert_same(found, run(tuned(), [method], [left])[0], 1e-7)
    assert ran == 1
    assert session.logged["holdfast/cache/base_ran_for_tokens"] == (left["labels"][:, 1:] != -100).sum()
    assert "rows are padded on the left" in caplog.text
    assert "rows are padded on the left" in session.told

    class Embedding(torch.nn.Module):
        """Hands its model embeddings in place of tokens."""

        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, use_cache):
            embedded = self.model.get_input_embeddings()(input_ids)
            return self.model(inputs_embeds=embedded, attention_mask=attention_mask, use_cache=use_cache)

    model = tuned()
    inside = Embedding(model.get_base_model())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with holdfast.preserve(model, optimizer, [method], reference="base", cache=tmp_path / "embedded") as session:
        inside(batch["input_ids"], batch["attention_mask"], use_cache=False)
        assert session.loss(batch) > 0
    assert "called with inputs_embeds" in caplog.text
    assert not (tmp_path / "embedded").exists()


def test_the_pieces_of_a_batch_lie_as_its_mask_does():
    """Rows of hidden[:, :-1][mask] belong to sequences in the order of `Pieces`."""
    from holdfast.core.types import Supervision
    from holdfast.retain.task_keys import Sequences, pieces

    batch = packed(rows_of(tiny.batches(2)))
    seen = Sequences(batch["input_ids"], [batch["input_ids"].shape[1]], batch["position_ids"])
    supervision = Supervision.of(batch)
    mask = supervision.mask("all")
    found = pieces(seen, mask, supervision.targets, apart=True)
    assert sum(found.counts) == mask.sum()
    places = mask[0].nonzero().flatten()
    starts = seen.starts(0)
    assert len(starts) == len(found.keys) == 4
    for i, (a, b) in enumerate(pairwise([*starts, seen.lengths[0]])):
        at = found.rows_of([i])
        assert ((places[at] >= a) & (places[at] < b)).all()
