"""Run by torchrun in 1 or 2 processes: what a budget finds, in float64 under DDP and in a real trainer."""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import holdfast  # noqa: E402
import torch  # noqa: E402
from holdfast.core.errors import WrongSetup  # noqa: E402
from holdfast.methods import L2SP, FullKL, SelfReplay, UpdateDecay  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import processes_done  # noqa: E402
import runs  # noqa: E402
import tiny  # noqa: E402

torch.set_num_threads(1)
METHODS = [
    SelfReplay(strength="auto", budget=1e-3, budget_every=1),
    UpdateDecay(strength="auto", budget=2e-3, budget_every=2),
]
FEW = [FullKL(strength="auto", budget=1e-3, budget_every=1)]


NAMED = [L2SP(strength="auto", budget={"norm": 1e-3}, budget_every=2)]


def norm(model: torch.nn.Module) -> float:
    """Return how far the factors B are from 0; the processes say different things, of which the mean is right."""
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    far = sum(p.square().sum().item() for name, p in model.named_parameters() if "lora_B" in name)
    return far + rank - (processes - 1) / 2


def other_rows_refused(rank: int) -> bool:
    """Return whether it is seen that every process has rows of its own."""
    try:
        found(FEW, tiny.batches(9, size=1, seed=4 + rank))
    except WrongSetup as error:
        assert "different retain sequences to measure drift on" in str(error)  # noqa: PT017
        return True
    return False


def found(made: list, retain: list) -> list[dict[str, float]]:
    """Return what is logged of six steps of plain descent, of four sequences each."""
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    model = tiny.lora(tiny.llama()).double().train()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    logged = []
    with holdfast.preserve(ddp, optimizer, made, retain=retain, measures={"norm": norm}) as session:
        for batch in tiny.batches(6, size=4, seed=9):
            micro = {k: v.chunk(processes)[rank] for k, v in batch.items()}
            counts = session.count([micro])
            logits = ddp(input_ids=micro["input_ids"], attention_mask=micro["attention_mask"]).logits
            task = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), micro["labels"][:, 1:].flatten(), reduction="sum"
            )
            loss = task * processes / counts.completion + session.loss(micro, counts, host_factor=processes)
            loss.backward()
            session.gradients_ready()
            optimizer.step()
            optimizer.zero_grad()
            mine = [b.state() for b in session.budgets._budgets.values()]
            everybody: list = [None] * processes
            torch.distributed.all_gather_object(everybody, mine)
            assert all(each == mine for each in everybody)  # to the last bit: else the processes part
            logged.append(session.pop_metrics())
    return logged


def trained(processes: int) -> list[dict[str, float]]:
    """Return what a real trainer logs of six steps of four examples."""
    trainer = runs.train(
        "sft",
        METHODS,
        retain=tiny.texts(40),
        steps=6,
        gradient_accumulation_steps=4 // processes,
        per_device_train_batch_size=1,
        optim="sgd",
        learning_rate=0.5,
    )
    assert trainer.accelerator.num_processes == processes
    return [{k: v for k, v in row.items() if "holdfast/" in k} for row in trainer.state.log_history[:6]]


def main(folder: str) -> None:
    """Save what every case finds."""
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    cases = {
        "loop": found(METHODS, tiny.batches(20, size=2, seed=4)),
        "few": found(FEW, tiny.batches(9, size=1, seed=4)),  # two sequences are held out
        "named": found(NAMED, []),
        "other rows refused": other_rows_refused(rank),
        "trainer": trained(processes),
    }
    if rank == 0:
        Path(folder, f"{processes}.json").write_text(json.dumps(cases))
    processes_done.leave()


if __name__ == "__main__":
    main(sys.argv[1])
