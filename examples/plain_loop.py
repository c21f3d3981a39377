"""Methods in a loop of your own: one context around it, `session.loss` and `session.gradients_ready` inside it.

python examples/plain_loop.py         # the lab's model, offline, on a CPU
"""

from __future__ import annotations

import holdfast
import torch
from holdfast import lab
from holdfast.integrations.retain_data import to_batches
from peft import LoraConfig, get_peft_model


def main(steps: int = 60) -> tuple[float, float]:
    """Tune on a new task; return how many of its test items, and of the old skills', the model then gets right."""
    torch.manual_seed(0)
    model, tokenizer = lab.load("lab-aligned")
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    batches = to_batches(lab.task("shift"), tokenizer, batch_size=16)  # input_ids, attention_mask, labels
    methods = [holdfast.methods.TargetMaskedKL(), holdfast.methods.AGEM(refresh_every=5)]

    model.train()
    with holdfast.preserve(model, optimizer, methods, retain=lab.retain(64), tokenizer=tokenizer) as session:
        for step in range(steps):
            batch = batches[step % len(batches)]
            loss = model(**batch).loss + session.loss(batch)
            loss.backward()
            session.gradients_ready()  # gradients are whole and not yet clipped
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % 20 == 0:
                print(step + 1, f"{loss.item():.3f}", session.pop_metrics())
    scores = lab.evaluate(model, tokenizer, items_per_skill=20)
    return scores.adaptation, scores.skill_mean


if __name__ == "__main__":
    new, old = main()
    print(f"new task {new:.2f}, old skills {old:.2f}")
