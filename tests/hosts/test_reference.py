"""The reference is the true base, or the session refuses; every case against logits computed by other means."""

import holdfast
import pytest
import torch
from holdfast.core.errors import NeverSupported, NotYetSupported, WrongSetup
from holdfast.core.reference import AdapterOff, FrozenCopy, OtherModel, logits_of, probe_batch
from holdfast.core.tap import Tap
from holdfast.integrations.peft import adapters_off, choose_reference
from holdfast.methods import FullKL, TargetMaskedKL
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import runs
import tiny


def base_logits(seed=0, **changes):
    """Logits of an untouched twin of the base."""
    model = tiny.llama(seed, **changes).eval()
    with torch.no_grad():
        return model(**probe_batch(model)).logits


def gap(reference, model):
    return (logits_of(reference, Tap(model), probe_batch(model)) - base_logits()).abs().max().item()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
)
def test_adapter_off_is_the_base_even_after_training(options):
    model = tiny.lora(tiny.llama(), **options)
    reference = choose_reference(model, None, Tap(model))
    assert isinstance(reference, AdapterOff)
    tiny.shake(model)
    assert gap(None, model) > 1e-2  # the student has moved
    assert gap(reference, model) == 0.0


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"bias": "all"},
        {"bias": "lora_only"},
    ],
)
def test_inits_that_move_base_weights_get_a_frozen_copy(options):
    model = tiny.lora(tiny.llama(attention_bias=True), **options)
    reference = choose_reference(model, None, Tap(model))
    assert isinstance(reference, FrozenCopy)
    tiny.shake(model)
    with adapters_off(model), torch.no_grad():
        off = model.eval()(**probe_batch(model)).logits
    theirs = base_logits(attention_bias=True)
    assert (off - theirs).abs().max() > 1e-3  # the trap: adapter off is not the base here
    assert (logits_of(reference, Tap(model), probe_batch(model)) - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("choice", [None, "base"])
@pytest.mark.parametrize(
    "options", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"bias": "lora_only"}]
)
def test_a_trained_adapter_that_took_base_weights_is_refused(tmp_path, options, choice):
    """One step of training and a reload: neither adapter-off nor the start is the base any more."""
    model = tiny.lora(tiny.llama(attention_bias=True), **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(**tiny.batches(1)[0]).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny.llama(attention_bias=True), tmp_path, is_trainable=True)
    with pytest.raises(WrongSetup, match="begins from a trained adapter"):
        choose_reference(model, choice, Tap(model))
    base = choose_reference(model, tiny.llama(attention_bias=True), Tap(model))
    ours, theirs = logits_of(base, Tap(model), probe_batch(model)), base_logits(attention_bias=True)
    assert (ours - theirs).abs().max() == 0.0


def corda(base, config):
    from peft.tuners.lora.corda import preprocess_corda

    rows = [b["input_ids"][:1] for b in tiny.batches(40)]  # it takes one row at a time
    preprocess_corda(base, config, run_model=lambda: [base(input_ids=row) for row in rows])


def lora_ga(base, config):
    from peft.tuners.lora.loraga import preprocess_loraga

    preprocess_loraga(base, config, lambda: [base(**batch).loss.backward() for batch in tiny.batches(4)])


@pytest.mark.parametrize("prepare", [corda, lora_ga])
def test_inits_that_read_data_get_a_frozen_copy(prepare):
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig

    details = {"corda": {"corda_config": CordaConfig()}, "lora_ga": {"lora_ga_config": LoraGAConfig()}}[
        prepare.__name__
    ]
    base = tiny.llama()
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=prepare.__name__,
        **details,
    )
    prepare(base, config)
    model = get_peft_model(base.requires_grad_(False), config)
    reference = choose_reference(model, None, Tap(model))
    assert isinstance(reference, FrozenCopy)
    tiny.shake(model)
    with adapters_off(model), torch.no_grad():
        assert (model.eval()(**probe_batch(model)).logits - base_logits()).abs().max() > 1e-3
    assert gap(reference, model) <= 1e-3


def test_inits_that_lose_the_base_are_refused(tmp_path):
    from peft.tuners.lora.config import KasaConfig

    tiny.llama().save_pretrained(tmp_path)
    model = tiny.lora(AutoModelForCausalLM.from_pretrained(tmp_path), kasa_config=KasaConfig())
    with pytest.raises(WrongSetup, match="KaSA.*changes the base weights"):
        choose_reference(model, None, Tap(model))
    assert gap(choose_reference(model, str(tmp_path), Tap(model)), model) == 0.0  # the way out that the message names
    start = choose_reference(model, "start", Tap(model))
    assert isinstance(start, FrozenCopy)
    assert gap(start, model) > 1e-3


def test_loftq_is_refused_by_name():
    """PEFT's LoftQ needs bitsandbytes, which has no CPU build; its name on the adapter is what the refusal reads."""
    model = tiny.lora(tiny.llama())
    model.peft_config["default"].init_lora_weights = "loftq"
    with pytest.raises(WrongSetup, match="loftq.*changes the base weights"):
        choose_reference(model, None, Tap(model))


def test_adapters_off_equals_pefts_own_and_touches_no_flag():
    model = tiny.lora(tiny.llama()).eval()
    tiny.shake(model)
    frozen = next(p for n, p in model.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    batch = probe_batch(model)
    with torch.no_grad():
        with adapters_off(model):
            ours = model(**batch).logits
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        assert not frozen.requires_grad
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, ours)
    assert frozen.requires_grad  # what ours avoids: PEFT's own context thaws a factor that was frozen
    assert len([n for n, p in model.named_parameters() if p.requires_grad]) == len(trainable) + 1


def test_a_run_that_begins_from_an_adapter_must_say_what_it_means(tmp_path):
    model = tiny.lora(tiny.llama())
    tiny.shake(model)
    model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    start = logits_of(None, Tap(model), probe_batch(model))
    with pytest.raises(WrongSetup, match="begins from an adapter"):
        choose_reference(model, None, Tap(model))
    base, kept = choose_reference(model, "base", Tap(model)), choose_reference(model, "start", Tap(model))
    stored = choose_reference(model, str(tmp_path), Tap(model))
    tiny.shake(model, seed=5)
    assert gap(base, model) == 0.0
    for reference in (kept, stored):
        assert torch.equal(logits_of(reference, Tap(model), probe_batch(model)), start)


def test_a_stored_adapter_as_reference_leaves_the_student_alone(tmp_path):
    other = tiny.lora(tiny.llama())
    tiny.shake(other)
    other.save_pretrained(tmp_path)
    model = tiny.lora(tiny.llama())
    before = tiny.trained(model)
    reference = choose_reference(model, str(tmp_path), Tap(model))
    assert all(torch.equal(v, before[k]) for k, v in tiny.trained(model).items())
    theirs = logits_of(None, Tap(other), probe_batch(other))
    assert torch.equal(logits_of(reference, Tap(model), probe_batch(model)), theirs)


def test_a_merged_adapter_is_refused_and_an_unloaded_one_found_out(tmp_path):
    model = tiny.lora(tiny.llama())
    tiny.shake(model)
    model.merge_adapter()
    with pytest.raises(WrongSetup, match="unmerge"):
        choose_reference(model, "base", Tap(model))
    tiny.llama().save_pretrained(tmp_path)
    loaded = tiny.lora(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert isinstance(choose_reference(loaded, None, Tap(loaded)), AdapterOff)
    tiny.shake(loaded)
    again = tiny.lora(loaded.merge_and_unload())  # looks like a fresh adapter on a fresh base
    with pytest.raises(WrongSetup, match="is not what .* holds"):
        choose_reference(again, None, Tap(again))
    true_base = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert gap(choose_reference(again, true_base, Tap(again)), again) == 0.0
    assert gap(choose_reference(again, str(tmp_path), Tap(again)), again) == 0.0


def test_a_pissa_adapter_that_is_not_fresh_is_found_out(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    model = tiny.lora(AutoModelForCausalLM.from_pretrained(tmp_path), init_lora_weights="pissa")
    assert isinstance(choose_reference(model, None, Tap(model)), FrozenCopy)
    tiny.shake(model)
    with pytest.raises(WrongSetup, match="not fresh"):
        choose_reference(model, None, Tap(model))


def test_dense_model_and_other_model():
    model = tiny.llama()
    reference = choose_reference(model, None, Tap(model))
    assert isinstance(reference, FrozenCopy)
    other = choose_reference(model, tiny.llama(), Tap(model))
    assert isinstance(other, OtherModel)
    tiny.shake(model)
    assert gap(reference, model) == 0.0
    assert gap(other, model) == 0.0


def test_prompt_learning_is_refused():
    model = get_peft_model(tiny.llama(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    params = [p for p in model.parameters() if p.requires_grad]
    with (
        pytest.raises(NeverSupported, match="virtual tokens"),
        holdfast.preserve(model, torch.optim.SGD(params, lr=0.1), [FullKL()]),
    ):
        pass


def test_a_name_that_is_nothing_is_refused():
    model = tiny.lora(tiny.llama())
    with pytest.raises(WrongSetup, match="neither 'base', 'start', nor a folder"):
        choose_reference(model, "basis", Tap(model))


@pytest.mark.parametrize("host", ["sft", "dpo", "trainer"])
@pytest.mark.parametrize(
    "adapter", [{}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}]
)
def test_divergence_starts_at_zero_on_every_host(host, adapter):
    """At the first step student and reference are one model, so the logged divergence is (almost) nothing."""
    model = tiny.lora(tiny.llama(), **adapter)
    log = runs.train(host, [TargetMaskedKL(), FullKL()], model).state.log_history
    values = [entry["holdfast/full_kl/divergence"] for entry in log if "holdfast/full_kl/divergence" in entry]
    assert len(values) == 3
    assert abs(values[0]) <= (1e-6 if "init_lora_weights" in adapter else 0.0)
    assert values[-1] > 1e-4


def test_a_trained_head_diverges_from_the_original_one():
    """modules_to_save=['lm_head'] trains a copy; the reference must keep to the original."""
    model = tiny.lora(tiny.llama(), modules_to_save=["lm_head"])
    params = [p for p in model.parameters() if p.requires_grad]
    batch = tiny.batches(1)[0]
    with holdfast.preserve(model, torch.optim.SGD(params, lr=0.1), [FullKL(strength=1.0)]) as session:
        head = model.get_base_model().lm_head
        with torch.no_grad():
            head.modules_to_save["default"].weight.mul_(1.3)
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        loss = session.loss(batch)
        loss.backward()
    with torch.no_grad(), model.disable_adapter():
        base = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    keep = batch["labels"][:, 1:] != -100
    p, q = (x[:, :-1][keep].log_softmax(-1) for x in (base, logits))
    expected = (p.exp() * (p - q)).sum() / keep.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert head.modules_to_save["default"].weight.grad.abs().sum() > 0
    assert head.original_module.weight.grad is None


def test_an_adapter_on_the_head_is_refused():
    model = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(NotYetSupported, match="not a plain linear map"):
        Tap(model)


def test_dropout_is_off_in_the_reference_and_on_in_the_student():
    model = tiny.lora(tiny.llama(attention_dropout=0.5), lora_dropout=0.5)
    reference = choose_reference(model, None, tap := Tap(model))
    model.train()
    batch = probe_batch(model)
    call = tap.run((), batch)
    hidden = reference.hidden(tap, call)
    assert torch.equal(hidden, reference.hidden(tap, call))
    assert not torch.equal(call.hidden, tap.run((), batch).hidden)
    assert all(module.training for module in model.modules())


def test_autocast_of_the_host_is_repeated():
    """A host that autocasts only its own forward must not make reference and student differ in precision."""
    model = tiny.lora(tiny.llama())
    params = [p for p in model.parameters() if p.requires_grad]
    batch = tiny.batches(1)[0]
    with holdfast.preserve(model, torch.optim.SGD(params, lr=0.1), [FullKL(strength=1.0)]) as session:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**batch)
        assert session.loss(batch).item() == 0.0
