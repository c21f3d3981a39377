"""Short real trainings on every host, for the tests of this folder."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import holdfast
import torch
from holdfast.core.method import Method
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import tiny

HOSTS = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig), "trainer": (Trainer, TrainingArguments)}


def trainer(host: str, model: Any = None, steps: int = 3, **options: Any) -> Any:
    """A real trainer of the host on a tiny model, not yet started."""
    kind, config = HOSTS[host]
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": steps,
        "bf16": False,
        "use_cpu": True,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "seed": 0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    args = config(**(settings | options))
    tok = tiny.tokenizer()
    model = model if model is not None else tiny.lora(tiny.llama())
    if host == "trainer":
        rows = [{k: v[i] for k, v in b.items()} for b in tiny.batches(16, size=4) for i in range(4)]
        return kind(model=model, args=args, train_dataset=rows, processing_class=tok)
    data = tiny.prompt_completion() if host == "sft" else tiny.preferences()
    # a dense model cannot be switched back to its start, so TRL's DPO wants a second one for its own reference
    reference = {"ref_model": tiny.llama()} if host == "dpo" and not hasattr(model, "peft_config") else {}
    held_out = {"eval_dataset": data} if "eval_strategy" in options else {}
    return kind(model=model, args=args, train_dataset=data, processing_class=tok, **reference, **held_out)


def train(
    host: str,
    methods: Sequence[Method] | None,
    model: Any = None,
    reference: Any = None,
    retain: Any = None,
    **options: Any,
) -> Any:
    """Train with methods (None: the host alone) and return the trainer."""
    made = trainer(host, model, **options)
    if methods is not None:
        holdfast.attach(made, methods, retain=tiny.texts() if retain is None else retain, reference=reference)
    made.train()
    return made


def loop(
    methods: Sequence[Method] | None,
    model: Any = None,
    split: int = 1,
    steps: int = 3,
    optimizer: Any = None,
    **options: Any,
) -> tuple[Any, Any]:
    """A plain loop: `steps` optimizer steps of four rows each, in `split` micro-batches; returns model and session."""
    model = model if model is not None else tiny.lora(tiny.llama())
    model.train()
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rows = tiny.batches(steps, size=4, seed=9)

    def micro_batches(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [{k: v.chunk(split)[i] for k, v in batch.items()} for i in range(split)]

    def tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (batch["labels"][:, 1:] != -100).sum()

    if methods is None:
        for batch in rows:
            for micro in micro_batches(batch):
                model(**micro, num_items_in_batch=tokens(batch)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, None
    options = {"retain": tiny.batches(4), **options}
    with holdfast.preserve(model, optimizer, methods, **options) as session:
        for batch in rows:
            counts = session.count(micro_batches(batch))
            for micro in micro_batches(batch):
                loss = model(**micro, num_items_in_batch=tokens(batch)).loss + session.loss(micro, counts)
                loss.backward()
            session.gradients_ready()
            optimizer.step()
            optimizer.zero_grad()
    return model, session


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Relative distance of two sets of parameters, |x - y| / |y| over all of them together."""
    assert ours.keys() == theirs.keys()
    apart = sum(((ours[k].double() - theirs[k].double()) ** 2).sum() for k in ours)
    size = sum((theirs[k].double() ** 2).sum() for k in ours)
    return float((apart / size).sqrt())


def identical(ours: Any, theirs: Any) -> bool:
    """Whether two models' trainable parameters agree bit for bit."""
    a, b = tiny.trained(ours), tiny.trained(theirs)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Bases(TrainerCallback):
    """Counts the passes of the base in every epoch; the last number is of what came after the last."""

    def __init__(self, session):
        self.ran, plain = [0], session.reference.hidden

        def counted(*given):
            self.ran[-1] += 1
            return plain(*given)

        session.reference.hidden = counted

    def on_epoch_end(self, args, state, control, **kwargs):
        self.ran.append(0)
