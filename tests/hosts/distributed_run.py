"""Run by torchrun in 1 or 2 processes: the same optimizer steps, saved as the change of each parameter."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import holdfast  # noqa: E402
import torch  # noqa: E402
from holdfast.methods import AGEM, L2SP, FullKL, OrthogonalProjection, TargetMaskedKL  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import processes_done  # noqa: E402
import runs  # noqa: E402
import tiny  # noqa: E402

torch.set_num_threads(1)
METHODS = [
    TargetMaskedKL(strength=2.0),
    FullKL(strength=0.5, positions="prompt"),
    L2SP(strength=0.1),
    AGEM(refresh_every=2, retain_batches=2),
    OrthogonalProjection(rank=4, refresh_every=2),
]


def plain(processes: int, rank: int) -> tuple[torch.nn.Module, dict[str, float]]:
    """DDP in a loop of one's own: rows of a step are dealt out to the processes."""
    model = tiny.lora(tiny.llama())
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    with holdfast.preserve(ddp, optimizer, METHODS, retain=tiny.batches(4)) as session:
        for batch in tiny.batches(5, size=4, seed=9):
            mine = {k: v.chunk(processes)[rank] for k, v in batch.items()}
            counts = session.count([mine])
            logits = ddp(input_ids=mine["input_ids"], attention_mask=mine["attention_mask"]).logits
            task = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), mine["labels"][:, 1:].flatten(), reduction="sum"
            )
            loss = task * processes / counts.completion + session.loss(mine, counts, host_factor=processes)
            loss.backward()
            session.gradients_ready()
            optimizer.step()
            optimizer.zero_grad()
        metrics = session.pop_metrics()
    return model, metrics


def main(folder: str) -> None:
    """Train on every host and save what changed."""
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    for host in ("sft", "sft dense", "dpo", "loop"):
        if host == "loop":
            model, metrics = plain(processes, rank)
        else:
            trainer = runs.train(
                host.split()[0],
                METHODS,
                tiny.llama() if "dense" in host else None,
                gradient_accumulation_steps=4 // processes,
                per_device_train_batch_size=1,
                optim="sgd",
                learning_rate=0.5,
                steps=5,
            )
            assert trainer.accelerator.num_processes == processes
            model, metrics = trainer.accelerator.unwrap_model(trainer.model), trainer.state.log_history[-2]
        if rank == 0:
            start = tiny.trained(tiny.llama() if "dense" in host else tiny.lora(tiny.llama()))
            change = {name: value - start[name] for name, value in tiny.trained(model).items()}
            logged = "holdfast/target_masked_kl/divergence"
            save_file(change | {logged: torch.tensor([metrics[logged]])}, f"{folder}/{host}{processes}.safetensors")
    processes_done.leave()


if __name__ == "__main__":
    main(sys.argv[1])
