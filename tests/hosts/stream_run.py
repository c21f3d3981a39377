"""Run by torchrun in 1 or 2 processes: the gradients of steps with retain sequences, in float64 under DDP."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import holdfast  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from holdfast.core.distributed import from_main  # noqa: E402
from holdfast.core.errors import NeverSupported, WrongSetup  # noqa: E402
from holdfast.methods import FullKL, SelfReplay, TargetMaskedKL  # noqa: E402
from holdfast.retain.kept import PoolError  # noqa: E402
from holdfast.retain.making import make  # noqa: E402
from holdfast.retain.settings import Settings  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import processes_done  # noqa: E402
import runs  # noqa: E402
import tiny  # noqa: E402

torch.set_num_threads(1)
METHODS = [SelfReplay(strength=2.0), FullKL(strength=0.5), TargetMaskedKL(on="retain", strength=0.5)]
# name: (kind, checkpointing, rows of a step, its micro-batches on each process)
CASES = {
    "lora": ("lora", False, 12, 1),
    "dense": ("dense", False, 12, 1),
    "accumulated": ("lora", False, 12, 3),
    "checkpointed": ("lora", True, 12, 2),
    "few": ("lora", False, 4, 1),  # one retain sequence: the second process has none
}


def student(kind: str, checkpointing: bool) -> torch.nn.Module:
    """A student in float64."""
    model = tiny.llama() if kind == "dense" else tiny.lora(tiny.llama())
    model = model.double().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def gradients(kind: str, checkpointing: bool, size: int, parts: int) -> dict[str, torch.Tensor]:
    """Return the gradients of two steps, and what was logged of them."""
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    model = student(kind, checkpointing)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found: dict[str, torch.Tensor] = {}
    with holdfast.preserve(ddp, optimizer, METHODS, retain=tiny.batches(15, seed=4)) as session:
        tiny.shake(model)
        for step, batch in enumerate(tiny.batches(2, size=size, seed=9)):
            mine = {k: v.chunk(processes)[rank] for k, v in batch.items()}
            micro_batches = [{k: v.chunk(parts)[i] for k, v in mine.items()} for i in range(parts)]
            counts = session.count(micro_batches)
            assert counts.sequences == size
            for i, micro in enumerate(micro_batches):
                ddp.require_backward_grad_sync = i == parts - 1
                logits = ddp(input_ids=micro["input_ids"], attention_mask=micro["attention_mask"]).logits
                task = torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), micro["labels"][:, 1:].flatten(), reduction="sum"
                )
                loss = task * processes / counts.completion + session.loss(micro, counts, host_factor=processes)
                loss.backward()
            session.gradients_ready()
            found |= {f"{step}/{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            optimizer.zero_grad()
        metrics = session.pop_metrics()
    return found | {f"logged/{k}": torch.tensor(v) for k, v in metrics.items()}


def reentrant() -> None:
    """Seen before it was refused: no error from DDP, gradients off by 42 %, another one on each process."""
    model = student("lora", False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = tiny.batches(1)[0]
    with holdfast.preserve(ddp, optimizer, [SelfReplay()], retain=tiny.batches(3)) as session:
        counts = session.count([batch])
        ddp(**batch)
        with pytest.raises(NeverSupported, match="use_reentrant"):
            session.loss(batch, counts)


def trained(host: str, processes: int) -> dict[str, torch.Tensor]:
    """Return how a real trainer changes the model in three steps of four examples."""
    trainer = runs.train(
        host,
        [SelfReplay(strength=2.0, share=0.5)],
        retain=tiny.texts(24),
        gradient_accumulation_steps=4 // processes,
        per_device_train_batch_size=1,
        optim="sgd",
        learning_rate=0.5,
    )
    assert trainer.accelerator.num_processes == processes
    start = tiny.trained(tiny.lora(tiny.llama()))
    model = trainer.accelerator.unwrap_model(trainer.model)
    logged = {"logged": torch.tensor(trainer.state.log_history[-2]["holdfast/self_replay/divergence"])}
    return {name: value - start[name] for name, value in tiny.trained(model).items()} | logged


def sampled() -> dict[str, torch.Tensor]:
    """Return the pool that is sampled where none was given: process 0 writes it, for all."""
    trainer = runs.trainer("sft")
    session = holdfast.attach(trainer, [SelfReplay()])
    pool = session.retain.sequences()
    assert len(pool) > 100
    return {str(number): ids for number, ids in enumerate(pool)}


def different() -> None:
    """Rows that are not the same on every process are refused, by all of them."""
    with pytest.raises(WrongSetup, match="different retain sequences"):
        holdfast.attach(runs.trainer("sft"), [SelfReplay()], retain=tiny.texts(8 + int(os.environ["RANK"])))
    with pytest.raises(WrongSetup if int(os.environ["RANK"]) else PoolError, match="cannot be made"):
        from_main(lambda: str(make(tiny.llama(), tiny.tokenizer(), Settings(mix={"own": 1.0}))))


def main(folder: str) -> None:
    """Save the gradients of every case, and what trainers make of them."""
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    found = {name: gradients(*case) for name, case in CASES.items()}
    found |= {host: trained(host, processes) for host in ("sft", "dpo")}
    found["sampled"] = sampled()
    if processes > 1:
        reentrant()
        different()
    if rank == 0:
        for name, tensors in found.items():
            save_file({k: v.contiguous() for k, v in tensors.items()}, f"{folder}/{name}{processes}.safetensors")
    processes_done.leave()


if __name__ == "__main__":
    main(sys.argv[1])
