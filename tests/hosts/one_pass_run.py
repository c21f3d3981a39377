"""Run by torchrun in 1 or 2 processes: the same optimizer steps in one pass over the head and, in 2, in two.

`apart`: each of the 2 processes has something that keeps it from one pass in micro-batches of its own.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import holdfast  # noqa: E402
import torch  # noqa: E402
from holdfast.methods import AGEM, TargetMaskedKL  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import processes_done  # noqa: E402
import runs  # noqa: E402
import tiny  # noqa: E402

torch.set_num_threads(1)


def main(folder: str, how: str) -> None:
    """Train and save what changed, and what was logged of the last step."""
    processes = int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))  # a process that waits in vain says so
    if how == "apart":
        for one_pass in (True, False):
            apart(folder, one_pass)
    else:
        for host in ("sft", "trainer"):
            for one_pass in (True, False)[:processes]:
                alike(folder, host, one_pass)
    processes_done.leave()


def alike(folder: str, host: str, one_pass: bool) -> None:
    processes = int(os.environ["WORLD_SIZE"])
    trainer = runs.trainer(
        host, gradient_accumulation_steps=4 // processes, per_device_train_batch_size=1, optim="sgd", learning_rate=0.5
    )
    start = tiny.trained(trainer.model)
    session = holdfast.attach(trainer, [TargetMaskedKL(strength=2.0)], one_pass=one_pass)
    assert ("One pass" if one_pass else "Two passes") in session.explain()
    trainer.train()
    keep(f"{folder}/{host}{processes}{one_pass}", trainer, start)


def apart(folder: str, one_pass: bool) -> None:
    """AGEM's references are a sum over processes, made anew in every step."""
    trainer = runs.trainer("trainer", gradient_accumulation_steps=2, optim="sgd", learning_rate=0.5)
    start, rank = tiny.trained(trainer.model), int(os.environ["RANK"])
    for row in trainer.train_dataset[4:8] if rank == 1 else []:
        row["labels"] = torch.where(row["labels"] == -100, -100, (row["labels"] + 1) % 96)
    session = holdfast.attach(trainer, [TargetMaskedKL(strength=2.0), AGEM()], retain=tiny.texts(), one_pass=one_pass)
    if rank == 0:
        hook = trainer.model.register_forward_hook(lambda *_: None if trainer.state.global_step else hook.remove())
    trainer.train()
    assert not one_pass or "all the same" in session.explain()
    keep(f"{folder}/apart{one_pass}", trainer, start)


def keep(path: str, trainer: Any, start: dict[str, torch.Tensor]) -> None:
    """Write down what a run has done, from the main process."""
    last = trainer.state.log_history[-2]
    model = trainer.accelerator.unwrap_model(trainer.model)
    found = {name: value - start[name] for name, value in tiny.trained(model).items()}
    found["loss"] = torch.tensor(last["loss"])
    found["divergence"] = torch.tensor(last["holdfast/target_masked_kl/divergence"])
    if int(os.environ["RANK"]) == 0:
        save_file(found, f"{path}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
