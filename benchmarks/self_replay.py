"""What self-replay costs: optimizer steps of a real TRL trainer with 12 + 4 sequences, against plain LoRA with 16.

    python benchmarks/self_replay.py                 # the committed table: about half an hour on one core
    python benchmarks/self_replay.py --quick         # the lab alone, five steps, nothing written

*135M* has the shape of SmolLM2-135M and random weights; every sequence, of the task and of the pool, has 64 tokens, so
that the counts of sequences are the counts of tokens. *lab* is the lab's aligned model on its own task, with the pool
of 256 that it samples for itself. All trainers stand ready in one process and make their steps in turn, so that what
else the machine does falls on all alike. A step is timed from the end of the one before, the loading of data included,
in CPU seconds; the first step of a trainer is left out. See README.md beside this.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import holdfast
import torch
from datasets import Dataset
from holdfast import lab
from holdfast.core.method import Method
from holdfast.integrations.pools import sampled
from holdfast.methods import SelfReplay, TargetMaskedKL
from holdfast.retain.settings import Settings
from peft import LoraConfig
from record import write
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

RESULTS = Path(__file__).parent / "results" / "self_replay.csv"
PLAIN, LENGTH, POOL = "plain LoRA, 16", 64, 48
VARIANTS: dict[str, tuple[int, list[Method]]] = {
    PLAIN: (16, []),
    "self-replay, 12 + 4": (12, [SelfReplay()]),
    "self-replay, 12 + 4, base run": (12, [SelfReplay(cache=False)]),
    "self-replay, 16 + 4": (16, [SelfReplay(share=0.2)]),
    "target_masked_kl, 16": (16, [TargetMaskedKL()]),
}


class Turn(TrainerCallback):
    """Holds a trainer in its own thread until its turn comes, and then lets it make one step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)

    def start(self, trainer: SFTTrainer) -> None:
        """Start the trainer, which waits before its first step."""

        def train() -> None:
            torch.set_num_threads(1)  # the setting is one of each thread
            try:
                trainer.train()
            finally:
                self._done.release()  # also if it failed: nobody waits for ever

        threading.Thread(target=train, daemon=True).start()

    def take(self) -> None:
        """Let it go as far as the end of its next step."""
        self._go.release()
        self._done.acquire()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the first turn."""
        self._go.acquire()
        self._started = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time, give the turn back, wait for the next."""
        self.seconds.append(time.process_time() - self._started)
        self._done.release()
        self._go.acquire()
        self._started = time.process_time()


def parts(name: str) -> tuple[Any, Any, Dataset, Any]:
    """Return a model, its tokenizer, task rows, and retain data."""
    model, tokenizer = lab.load("lab-aligned")
    if name == "lab":
        return model, tokenizer, Dataset.from_list(lab.task("shift", n=400)), ()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49_152, tie_word_embeddings=True, max_position_embeddings=512,
    )  # fmt: skip

    def rows(n: int, seed: int) -> list[list[int]]:
        return torch.randint(0, 49_152, (n, LENGTH), generator=torch.Generator().manual_seed(seed)).tolist()

    retain = [{"input_ids": ids} for ids in rows(POOL, 1)]
    return LlamaForCausalLM(config), tokenizer, Dataset.from_dict({"input_ids": rows(400, 0)}), retain


def started(name: str, variant: str, steps: int) -> Turn:
    """A trainer of one variant that waits for its turn."""
    model, tokenizer, rows, retain = parts(name)
    size, methods = VARIANTS[variant]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(), max_steps=steps + 1, per_device_train_batch_size=size, learning_rate=1e-4,
            bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
            save_strategy="no", logging_strategy="no",
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )  # fmt: skip
    if methods:
        holdfast.attach(trainer, methods, retain=retain)
    trainer.add_callback(turn := Turn())
    turn.start(trainer)
    return turn


def preparing() -> list[dict[str, object]]:
    """Time what comes once for the lab: the pool of 256; its cache is made in the first step, and timed with it."""
    model, tokenizer = lab.load("lab-aligned")
    started = time.process_time()
    pool = sampled(model, tokenizer, Settings(seed=7))
    seconds = time.process_time() - started
    common = {"dtype": "float32", "tokens": sum(len(kept.input_ids) for kept in pool), "rounds": 1}
    return [{**common, "variant": "lab, sampling the pool", "metric": "cpu seconds", "value": seconds}]


def table(name: str, steps: int) -> list[dict[str, object]]:
    """Time the steps of all variants in turn, one of each in every round, each round in another order."""
    turns = {variant: started(name, variant, steps) for variant in VARIANTS}
    for number in range(steps + 1):
        for variant in random.Random(number).sample(list(VARIANTS), len(VARIANTS)):
            turns[variant].take()
            if len(turns[variant].seconds) != number + 1:
                raise SystemExit(f"{name}, {variant}: the trainer stopped at step {number}, see above.")
        told = ", ".join(f"{variant} {turn.seconds[-1]:.2f}" for variant, turn in turns.items())
        print(f"{name}, step {number} of {steps}: {told}", flush=True)
    found = {variant: turn.seconds[1:] for variant, turn in turns.items()}  # the first is for warming up
    common = {"dtype": "float32", "tokens": LENGTH * 16 if name != "lab" else "", "rounds": steps}
    plain = {"variant": f"{name}, {PLAIN}", "metric": "cpu seconds a step", "value": statistics.median(found[PLAIN])}
    rows: list[dict[str, object]] = [{**common, **plain}]
    for variant in VARIANTS:
        if variant != PLAIN:
            ratio = statistics.median(a / b for a, b in zip(found[variant], found[PLAIN], strict=True))
            metric = "cpu seconds a step, ratio"
            rows.append({**common, "variant": f"{name}, {variant}", "peer": PLAIN, "metric": metric, "value": ratio})
    return rows


def main() -> None:
    """Time the steps, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the lab alone, five steps, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HOLDFAST_CACHE"] = folder
        found = preparing() + table("lab", 5 if options.quick else 60)
        if not options.quick:
            found += table("135M", 15)
    if not options.quick:
        write(found, RESULTS)
    for row in found:
        print("\t".join(str(value) for value in row.values()))


if __name__ == "__main__":
    main()
