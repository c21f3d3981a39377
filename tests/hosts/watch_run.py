"""Run by torchrun in 2 processes: watched trainings, and what every process made of them."""

import json
import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import holdfast  # noqa: E402
import torch  # noqa: E402
from holdfast.analysis.budgets import Budget, Gate  # noqa: E402
from holdfast.core.selection import trainable  # noqa: E402
from holdfast.drift.models import digest  # noqa: E402
from holdfast.drift.probes.exact_answer import ExactAnswer, Question  # noqa: E402
from holdfast.drift.probes.output_kl import OutputKL  # noqa: E402

import processes_done  # noqa: E402
import runs  # noqa: E402
import tiny  # noqa: E402

torch.set_num_threads(1)
warnings.simplefilter("ignore")
TEXTS = sorted({row["text"] for row in tiny.texts(24)})
HARSH = {"learning_rate": 5e-2, "lr_scheduler_type": "constant"}


def watched(folder: Path, limit: float, when_exceeded: str, name: str = "output_kl.texts", dense: bool = False) -> dict:
    """Train and say what came out in this process; a fault is an outcome too."""
    model = tiny.llama() if dense else tiny.lora(tiny.llama(), lora_dropout=0.1)
    trainer = runs.trainer("sft", model, 4, output_dir=str(folder), **HARSH)
    probes = [OutputKL("texts", TEXTS), ExactAnswer("words", [Question(TEXTS[0], "w1")], max_new_tokens=3)]
    gate = Gate((Budget(name, "rise", limit),))
    callback = holdfast.watch(trainer, probes, every=1, gate=gate, when_exceeded=when_exceeded)
    told: list[str] = []
    callback.say = told.append
    fault = ""
    try:
        trainer.train()
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    own = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "fault": fault,
        "step": trainer.state.global_step,
        "looks": [[look.step, dict(look.metrics), len(look.exceeded)] for look in callback.looks],
        "weights": digest(trainable(trainer.accelerator.unwrap_model(trainer.model))),
        "told": told,
        "losses": [row["loss"] for row in own],
    }


def main(folder: Path) -> None:
    """All cases, one after the other, each in its own folder."""
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    alone = runs.trainer("sft", tiny.lora(tiny.llama(), lora_dropout=0.1), 4, **HARSH)
    alone.train()
    found = {
        "alone": {"weights": digest(trainable(alone.accelerator.unwrap_model(alone.model)))},
        "watched": watched(folder / "log", 50.0, "log"),
        "stopped": watched(folder / "stop", 1e-6, "stop"),
        "put back": watched(folder / "keep", float(os.environ["LIMIT"]), "keep_best"),
        "dense": watched(folder / "dense", 1e-6, "stop", dense=True),
        "faulty": watched(folder / "faulty", 0.1, "log", name="no_such_score"),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    processes_done.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
