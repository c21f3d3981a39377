"""What is said of DPO's own reference is what its loss uses: log-probabilities are compared for many kinds of model."""

from __future__ import annotations

import copy

import pytest
import torch
from holdfast.recipe import training
from holdfast.recipe.run import run
from holdfast.recipe.training import dpo_reference
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, PeftModel, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

import tiny

LM = {"task_type": "CAUSAL_LM"}
LINEAR = {"r": 4, "target_modules": "all-linear", **LM}
KINDS = {
    "lora": LoraConfig(**LINEAR),
    "dora": LoraConfig(use_dora=True, **LINEAR),
    "saved modules": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], **LM),
    "embedding": LoraConfig(r=4, target_modules=["embed_tokens"], **LM),
    "embedding and linear": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], **LM),
    "oft": OFTConfig(oft_block_size=4, target_modules=["q_proj"], **LM),
    "pissa": LoraConfig(init_lora_weights="pissa", **LINEAR),
    "olora": LoraConfig(init_lora_weights="olora", **LINEAR),
    "random": LoraConfig(init_lora_weights=False, **LINEAR),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **LM),
    "loha": LoHaConfig(r=4, target_modules=["q_proj"], **LM),
    "vera": VeraConfig(r=8, target_modules=["q_proj"], **LM),
}
SHORT = "max_steps: 2, per_device_train_batch_size: 2, learning_rate: 5e-3, report_to: none, disable_tqdm: true"


def trainer(folder, model, peft_config=None, **options):
    args = DPOConfig(
        output_dir=str(folder / "trainer"), bf16=False, use_cpu=True, report_to="none", per_device_train_batch_size=4,
        max_steps=2, save_strategy="no", disable_tqdm=True, **{"learning_rate": 0.1, **options},
    )  # fmt: skip
    return DPOTrainer(
        model=model, args=args, train_dataset=tiny.preferences(8), processing_class=tiny.tokenizer(),
        peft_config=copy.deepcopy(peft_config),
    )  # fmt: skip


def log_probs(model, batch):
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    each = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (each * batch["completion_mask"][:, 1:]).sum(1)


def batch_of(made):
    return made.data_collator([made.train_dataset[i] for i in range(8)])


def in_the_loss(made, batch):
    return torch.cat(made.compute_ref_log_probs(made.ref_model or made.model, batch))  # as TRL's loss calls it


def check(made, base, said):
    """Train on, then see whether the log-probabilities that the loss uses are those that were said."""
    batch = batch_of(made)
    made.model.eval()
    start, base = log_probs(made.model, batch), log_probs(base, batch)
    made.train()
    made.model.eval()
    reference = in_the_loss(made, batch)
    is_start, is_base = (torch.allclose(reference, other, atol=1e-3) for other in (start, base))
    assert not torch.allclose(log_probs(made.model, batch), start, atol=1e-2)  # it did train
    assert is_base == said.startswith("the base")
    if said.startswith("neither"):
        assert not is_start
    else:
        assert is_start == (f"NOT {training.START}" not in said)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_is_compared_with_itself_switched_off(tmp_path, kind):
    made = trainer(tmp_path, tiny.llama(), KINDS[kind], learning_rate=5.0 if kind == "vera" else 0.1)
    said = dpo_reference(made)
    assert said.startswith("neither" if kind in ("pissa", "olora") else "the base, which is the model with its adapter")
    check(made, tiny.llama(), said)


KEPT = ("lora", "dora", "oft", "saved modules", "random", "pissa", "olora")


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_an_earlier_stage_is_kept_as_ref_where_TRL_copies_it(tmp_path, kind):
    """TRL 1.16 copies tensors with '.default.' in their names; those of IA3, LoHa, VeRA and embeddings have none."""
    earlier = get_peft_model(tiny.llama(), copy.deepcopy(KINDS[kind]))
    tiny.shake(earlier, 0.3)
    earlier.save_pretrained(tmp_path / "earlier")
    made = trainer(tmp_path, PeftModel.from_pretrained(tiny.llama(), tmp_path / "earlier", is_trainable=True))
    said = dpo_reference(made)
    if kind in KEPT:
        assert said == f"{training.START}, kept by TRL as the adapter 'ref'."
    elif kind == "embedding and linear":
        assert said.startswith("neither the base nor the model as this stage begins: TRL copied only a part")
    else:
        assert said.startswith("the base, NOT the model as this stage begins: TRL did not copy the adapter")
    check(made, tiny.llama(), said)


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}])
def test_a_dense_model_is_loaded_once_more(tmp_path, options):
    tiny.llama(seed=5).save_pretrained(tmp_path / "stage")
    made = trainer(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path / "stage"), **options)
    said = dpo_reference(made)
    assert said.startswith(training.START)
    if options:
        assert said.endswith("computed before training.")
        start = log_probs(tiny.llama(seed=5), batch_of(made)).chunk(2)[0]
        assert torch.allclose(torch.tensor(made.train_dataset["ref_chosen_logps"]), start, atol=1e-3)
    else:
        assert str(tmp_path / "stage") in said
        check(made, tiny.llama(), said)


def test_a_dense_model_that_is_not_what_TRL_loads_is_told(tmp_path):
    """As with a revision of a hub model: TRL loads the reference by the name alone."""
    tiny.llama(seed=5).save_pretrained(tmp_path / "stage")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stage")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    made = trainer(tmp_path, model)
    said = dpo_reference(made)
    assert f"which is NOT {training.START}" in said
    check(made, tiny.llama(), said)


def test_a_reference_that_moves_is_told(tmp_path):
    tiny.llama(seed=5).save_pretrained(tmp_path / "stage")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stage")
    made = trainer(tmp_path, model, sync_ref_model=True, ref_model_sync_steps=1)
    assert "then moved towards the student every 1 steps" in dpo_reference(made)
    before = log_probs(model, batch_of(made))
    made.train()
    after = in_the_loss(made, batch_of(made))
    assert not torch.allclose(before, after, atol=1e-3)


def test_biases_that_are_trained_in_place_are_told(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], bias="all", **LM)
    made = trainer(tmp_path, tiny.llama(attention_bias=True), config)
    assert "but for biases, which are trained in place (bias='all')" in dpo_reference(made)
    before = in_the_loss(made, batch_of(made))
    made.train()
    after = in_the_loss(made, batch_of(made))
    assert not torch.allclose(before, after, atol=1e-3)


def test_looking_changes_nothing(tmp_path):
    made = trainer(tmp_path, tiny.lora(tiny.llama()))
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in made.model.named_parameters()}
    active, training_mode = made.model.active_adapter, made.model.training
    state = torch.get_rng_state()
    dpo_reference(made)
    after = dict(made.model.named_parameters())
    assert all(torch.equal(p, after[name]) and flag == after[name].requires_grad for name, (p, flag) in before.items())
    assert (made.model.active_adapter, made.model.training) == (active, training_mode)
    assert torch.equal(torch.get_rng_state(), state)


STAGES = """\
model: {name: TINY, MODEL}
stages:
  - {trainer: dpo, data: {data: "lab:preference_pairs", samples: 8}, SHORT}
  - {trainer: dpo, data: {data: "lab:preference_pairs", samples: 8}, SHORT, methods: [l2_sp]}
methods: [target_masked_kl]
reference: start
output: out
"""


@pytest.mark.parametrize("adapter", [True, False])
def test_a_run_says_both_references(recipe, here, tiny, adapter):
    told = []
    model = "lora: {r: 4}" if adapter else "dtype: float32"
    run(recipe(STAGES.replace("MODEL", model).replace("SHORT", SHORT)), told.append)
    ours = [line for line in told if line.startswith("DPO's own reference (its loss compares with it): ")]
    places = [str(tiny), "out/stage-1/result"]
    for line, place, fresh in zip(ours, places, (True, False), strict=True):
        if not adapter:
            assert f"{training.START}, loaded by TRL once more from {place}" in line
        else:
            assert ("the base, which is" if fresh else f"{training.START}, kept by TRL as the adapter 'ref'") in line
    theirs = [line for line in told if line.startswith("holdfast's reference (its methods compare with it): ")]
    assert [line.split(": ")[1] for line in theirs] == [
        f"{training.START}.",
        "none, since no method of this stage has one.",
    ]
