"""TRL takes the lab's data and models as they are."""

import pytest
from holdfast import lab

trl = pytest.importorskip("trl")


def settings(kind, directory, **more):
    return kind(
        output_dir=str(directory), max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        bf16=False, gradient_checkpointing=False, save_strategy="no", logging_steps=1, disable_tqdm=True, **more,
    )  # fmt: skip


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules="all-linear")


DATA = {
    "shift": lambda: lab.task("shift", n=16),
    "second": lambda: lab.task("second", n=16),
    "safety": lambda: lab.safety_sft(16),
    "retain-text": lambda: lab.retain(16),
    "retain-chat": lambda: lab.retain(16, form="chat"),
}


@pytest.mark.parametrize("name", DATA)
def test_sft(name, tmp_path):
    from datasets import Dataset

    model, tokenizer = lab.load("lab-aligned")
    trainer = trl.SFTTrainer(
        model, settings(trl.SFTConfig, tmp_path, assistant_only_loss=name == "retain-chat"),
        train_dataset=Dataset.from_list(DATA[name]()), processing_class=tokenizer, peft_config=lora(),
    )  # fmt: skip
    trainer.train()
    assert 0 < trainer.state.log_history[0]["loss"] < 10
    if name == "shift":
        first = trainer.train_dataset[0]
        assert tokenizer.decode(first["input_ids"]).startswith("<|bos|><|user|>")
        assert tokenizer.decode(first["input_ids"]).endswith("<|end|>")


def test_dpo(tmp_path):
    from datasets import Dataset

    model, tokenizer = lab.load("lab-pretrained")
    trainer = trl.DPOTrainer(
        model, args=settings(trl.DPOConfig, tmp_path), processing_class=tokenizer, peft_config=lora(),
        train_dataset=Dataset.from_list(lab.preference_pairs(16)),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693, abs=1e-2)
