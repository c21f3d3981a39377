"""An existing TRL script, and the two lines that make it keep what the model knew: the import and `attach`.

python examples/trl_sft.py            # the lab's model, offline, on a CPU
"""

from __future__ import annotations

import holdfast
from datasets import Dataset
from holdfast import lab
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer


def main(steps: int = 60, output: str = "runs/trl-sft") -> tuple[float, float]:
    """Tune on a new task; return how many of its test items, and of the old skills', the model then gets right."""
    model, tokenizer = lab.load("lab-aligned")
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=output, max_steps=steps, per_device_train_batch_size=16, learning_rate=2e-3,
            bf16=False, activation_checkpointing=False, save_strategy="no", logging_steps=20,
        ),
        train_dataset=Dataset.from_list(lab.task("shift")),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    session = holdfast.attach(trainer, [holdfast.methods.TargetMaskedKL(strength=1.0)])
    print(session.explain())
    trainer.train()
    scores = lab.evaluate(trainer.model, tokenizer, items_per_skill=20)
    return scores.adaptation, scores.skill_mean


if __name__ == "__main__":
    new, old = main()
    print(f"new task {new:.2f}, old skills {old:.2f}")
