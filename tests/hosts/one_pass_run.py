"""Run by torchrun in 1 or 2 processes: the same optimizer steps in one pass over the head and, in 2, in two."""

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

import processes_done  # noqa: E402
import runs  # noqa: E402
import tiny  # noqa: E402

torch.set_num_threads(1)


def main(folder: str) -> None:
    """Train and save what changed, and what was logged of the last step."""
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    for host in ("sft", "trainer"):
        for one_pass in (True, False)[:processes]:
            trainer = runs.trainer(
                host, gradient_accumulation_steps=4 // processes, per_device_train_batch_size=1, optim="sgd",
                learning_rate=0.5,
            )  # fmt: skip
            start = tiny.trained(trainer.model)
            session = holdfast.attach(trainer, [TargetMaskedKL(strength=2.0)], one_pass=one_pass)
            assert ("One pass" if one_pass else "Two passes") in session.explain()
            trainer.train()
            last = trainer.state.log_history[-2]
            model = trainer.accelerator.unwrap_model(trainer.model)
            found = {name: value - start[name] for name, value in tiny.trained(model).items()}
            found["loss"] = torch.tensor(last["loss"])
            found["divergence"] = torch.tensor(last["holdfast/target_masked_kl/divergence"])
            if rank == 0:
                save_file(found, f"{folder}/{host}{processes}{one_pass}.safetensors")
    processes_done.leave()


if __name__ == "__main__":
    main(sys.argv[1])
