"""Run by torchrun in 1 or 2 processes: two epochs of SFT with a cache of the base, saved as what changed."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import holdfast  # noqa: E402
import torch  # noqa: E402
from holdfast.methods import TargetMaskedKL  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

import processes_done  # noqa: E402
import runs  # noqa: E402
import tiny  # noqa: E402

torch.set_num_threads(1)


def train(folder: str, cache: object, processes: int) -> tuple[torch.nn.Module, list[int]]:
    rows = [{k: v[i] for k, v in batch.items()} for batch in tiny.batches(4, size=4) for i in range(4)]
    args = TrainingArguments(
        output_dir=folder, num_train_epochs=2, per_device_train_batch_size=2, optim="sgd", learning_rate=0.5,
        gradient_accumulation_steps=2 // processes, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, seed=0, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = Trainer(model=tiny.lora(tiny.llama()), args=args, train_dataset=rows, processing_class=tiny.tokenizer())
    session = holdfast.attach(trainer, [TargetMaskedKL(strength=2.0)], cache=cache)
    trainer.add_callback(counted := runs.Bases(session))
    trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model), counted.ran


def main(folder: str) -> None:
    """Train with and without a cache, and save what changed."""
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    for name, cache in (("live", False), ("cached", f"{folder}/kept{processes}")):
        model, ran = train(f"{folder}/{name}", cache, processes)
        every = [torch.zeros(2, dtype=torch.int64) for _ in range(processes)]
        torch.distributed.all_gather(every, torch.tensor(ran[:2]))
        if rank == 0:
            start = tiny.trained(tiny.lora(tiny.llama()))
            change = {key: value - start[key] for key, value in tiny.trained(model).items()}
            save_file(change | {"ran": torch.stack(every)}, f"{folder}/{name}{processes}.safetensors")
    processes_done.leave()


if __name__ == "__main__":
    main(sys.argv[1])
