"""What the masked KL adds to a training step: optimizer steps of a real TRL trainer, against plain LoRA SFT.

    python benchmarks/step.py                   # the committed table: about forty minutes on one core
    python benchmarks/step.py --quick           # a tiny model, two rounds, nothing written (--tiny is the same)
    python benchmarks/step.py --only B12        # jobs whose name has this in it; --help names them all

    ratio = median seconds of a step with the method / median seconds of a plain step of the same trainer

Llamas of 40 and 49 M parameters with random weights and LoRA r = 16; a step is 8 sequences of 128 tokens, all of them
supervised. All trainers of a job stand ready in one process and make their steps in turn, on the same sequences. They
run a whole epoch first, in which the cache is filled; what is timed is the next one, so a cached base is read from
disk. First of all, at a tiny size, the variants must train the same weights. See README.md beside this.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import holdfast
import torch
from datasets import Dataset
from holdfast import lab
from holdfast.methods import TargetMaskedKL
from peft import LoraConfig
from record import Row, carry_out, parser
from self_replay import Turn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer
from turns import in_turns, rows

RESULTS = Path(__file__).parent / "results" / "step.csv"
PLAIN, LIVE, TWO = "plain SFT", "masked KL, live base", "masked KL, live base, two passes over the head"
CACHED, SHARED, WHOLE = "masked KL, cached", "masked KL, lower layers shared", "masked KL, lower layers run twice"
# what each variant tells holdfast.attach; cache: a folder is put in, of the variant's own
VARIANTS: dict[str, dict[str, object] | None] = {
    PLAIN: None,
    LIVE: {},
    TWO: {"one_pass": False},
    CACHED: {"cache": True},
    SHARED: {"share_prefix": True},
    WHOLE: {"share_prefix": False},
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROUNDS = 9


class Size(NamedTuple):
    """A model and a step."""

    width: int
    layers: int
    vocab: int
    sequences: int
    length: int
    epoch: int  # steps


SMALL, LARGE = Size(512, 10, 8192, 8, 128, ROUNDS), Size(512, 10, 32_000, 8, 128, ROUNDS)
TINY = Size(64, 2, 211, 4, 16, 2)


def trainer(variant: str, size: Size, folder: str, epochs: int, upper: bool, **options: object) -> SFTTrainer:
    """Return a trainer of one variant that has not begun, all of them with the same model and data.

    Args:
        variant: of `VARIANTS`.
        size: of the model and of a step.
        folder: for a cache.
        epochs: to train for.
        upper: whether LoRA is on the upper half of the layers alone.
        options: more of `SFTConfig`'s.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.width, intermediate_size=size.width * 11 // 4, num_hidden_layers=size.layers,
        num_attention_heads=8, num_key_value_heads=8, vocab_size=size.vocab, max_position_embeddings=size.length,
        tie_word_embeddings=size.vocab > 8192,
    )  # fmt: skip
    shape = (size.epoch * size.sequences, size.length)
    ids = torch.randint(5, size.vocab, shape, generator=torch.Generator().manual_seed(0)).tolist()
    settings: dict[str, Any] = {
        "per_device_train_batch_size": size.sequences, "num_train_epochs": epochs, "learning_rate": 1e-4,
        "max_length": None, "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none",
        "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "output_dir": f"{folder} output",
    }  # fmt: skip
    half = list(range(size.layers // 2, size.layers)) if upper else None
    made = SFTTrainer(
        model=LlamaForCausalLM(config),
        args=SFTConfig(**(settings | options)),
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, layers_to_transform=half),
    )
    made.remove_callback(PrinterCallback)
    if (asked := VARIANTS[variant]) is not None:
        session = holdfast.attach(made, [TargetMaskedKL()], **(asked | ({"cache": folder} if "cache" in asked else {})))
        told = session.explain()
        words = {TWO: "Two passes over the head", SHARED: "run once, for student and base"}
        if words.get(variant, "One pass over the head") not in told:
            raise SystemExit(f"{variant}: this is not what would be measured.\n{told}")
    return made


@cache
def tokenizer() -> Any:
    """Return one; the ids of the data are random."""
    return lab.load("lab-aligned")[1]


def correctness_gate(folder: str) -> None:
    """Stop unless all variants train the same weights, over two epochs; nothing wrong is worth timing."""
    for upper, names in ((False, (LIVE, TWO, CACHED)), (True, (LIVE, SHARED, WHOLE))):
        ends: dict[str, torch.Tensor] = {}
        for name in names:
            made = trainer(name, TINY, f"{folder}/gate {upper}", 2, upper, optim="sgd", learning_rate=0.5)
            start = weights(made.model)
            made.train()
            ends[name] = weights(made.model) - start
        for name in names[1:]:
            error = ((ends[name] - ends[names[0]]).norm() / ends[names[0]].norm()).item()
            if not error <= 1e-4:
                raise SystemExit(f"{name} does not train what {names[0]} trains: they differ by {error:.1e}.")
    print("correctness gate passed", flush=True)


def weights(model: torch.nn.Module) -> torch.Tensor:
    """Return all trained weights in a row."""
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def started(made: SFTTrainer) -> Turn:
    """Start a trainer, which waits for its turn."""
    made.add_callback(turn := Turn())
    turn.start(made)
    return turn


def one_step(name: str, turn: Turn) -> None:
    """Let a trainer make one step."""
    before = len(turn.seconds)
    turn.take()
    if len(turn.seconds) == before:
        raise SystemExit(f"{name}: the trainer stopped after {before} steps, see above.")


def steps(
    names: Sequence[str], size: Size, folder: str, *, prefix: str = "", upper: bool = False, **options: object
) -> list[Row]:
    """Time the steps of some variants in turn: one epoch to warm up, and then another."""
    # made before any of them starts: a new trainer resets what accelerate knows of the process
    made = {name: trainer(name, size, f"{folder}/{prefix}{name} {size}", 3, upper, **options) for name in names}
    takes = {name: partial(one_step, prefix + name, started(each)) for name, each in made.items()}
    in_turns(takes, size.epoch, f"{prefix}warming up")
    found = in_turns(takes, size.epoch, f"{prefix}steps")
    pairs = [(name, PLAIN) for name in names if name != PLAIN] + [(LIVE, TWO), (SHARED, WHOLE)]
    shape = f"{size.width}/{size.vocab}"
    return rows(found, pairs, {"dtype": "float32", "shape": shape, "tokens": size.sequences * size.length}, prefix)


def jobs(folder: str, tiny: bool) -> Mapping[str, Any]:
    """Return what is to be measured, by the rows of the table."""
    every = [PLAIN, LIVE, TWO, CACHED]
    small, large = (TINY, TINY) if tiny else (SMALL, LARGE)
    checkpointed = {"prefix": "checkpointing: ", "gradient_checkpointing": True}
    return {
        "B10 B11, vocabulary of 8,192": partial(steps, every, small, folder),
        "B10, with checkpointing": partial(steps, [PLAIN, LIVE], small, folder, **checkpointed),
        "B12, LoRA on the upper half": partial(
            steps, [PLAIN, SHARED, WHOLE], small, folder, prefix="upper half: ", upper=True
        ),
        "B10 B11, vocabulary of 32,000": partial(steps, every, large, folder),
    }


def main() -> None:
    """Time the steps, and write the table."""
    options = parser(__doc__, jobs("", False))
    options.add_argument("--tiny", dest="quick", action="store_true", help="the same as --quick")
    asked = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HOLDFAST_CACHE"] = folder
        correctness_gate(folder)
        carry_out(jobs(folder, asked.quick), RESULTS, asked)


if __name__ == "__main__":
    main()
