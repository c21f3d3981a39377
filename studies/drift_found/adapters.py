"""What is compared: bases in folders, and the LoRA adapters that are trained on them; read `measuring` next."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studies.common_training import steps

if TYPE_CHECKING:
    from torch import Tensor, nn

LAB = "lab-aligned"
ALIGNED, PLAIN = "stories-aligned", "stories260K"  # folders in the working folder
RANK, ALPHA = 8, 16
STORIES = 64  # texts that the stories' perplexity is measured on
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"  # asked as it was aligned
)


@dataclass(frozen=True)
class Tuning:
    """One way to tune: no steps leave B = 0, an adapter that changes nothing.

    Args:
        title: of the experiment.
        base: a model of the lab, or a folder in the working folder.
        task: what is trained on, a name in `TASKS`.
        rate: of AdamW, constant.
        steps: how many.
        batch: rows in each.
    """

    title: str
    base: str
    task: str = "shift"
    rate: float = 1e-3
    steps: int = 0
    batch: int = 16

    @property
    def settings(self) -> dict[str, Any]:
        """What the ledger calls them."""
        return {"task": self.task, "learning_rate": self.rate, "steps": self.steps} if self.steps else {}


TUNINGS = {
    "lab-identical": Tuning("lab, B = 0", LAB),
    "lab-mild": Tuning("lab, mild", LAB, rate=1e-4, steps=20),
    "lab-harsh": Tuning("lab, harsh", LAB, rate=4e-3, steps=100),
    "stories-identical": Tuning("stories, B = 0", ALIGNED),
    "stories-identity": Tuning("stories, identity shift", ALIGNED, "identity", rate=4e-3, steps=25, batch=2),
    "stories-sql": Tuning("stories, WikiSQL", PLAIN, "sql", rate=3e-3, steps=100, batch=8),
}


def adapter(tuning: Tuning, seed: int, data: Path, work: Path) -> Path:
    """Train an adapter, unless it is there, and return its folder."""
    import torch
    from peft import LoraConfig, get_peft_model

    folder = work / f"adapters/{tuning.title.replace(', ', '-').replace(' ', '-').replace('-=-', '')}-{seed}"
    if (folder / "adapter_config.json").exists():
        return folder
    torch.manual_seed(seed)
    base, tokenizer = loaded(tuning.base, work)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    if tuning.steps:
        batches = TASKS[tuning.task](tuning, tokenizer, seed, data)
        for _ in steps(model, batches, [], rate=tuning.rate, warm_up=1, retain=()):
            pass
    model.save_pretrained(folder)
    return folder


def loaded(base: str, work: Path) -> tuple[nn.Module, Any]:
    """A model of the lab or of the working folder, with its tokenizer."""
    from holdfast import lab
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if base == LAB:
        return lab.load(base)
    return AutoModelForCausalLM.from_pretrained(work / base), AutoTokenizer.from_pretrained(work / base)


def bases(data: Path, work: Path) -> None:
    """Write stories260K, and stories260K after it has learnt to refuse, into the working folder, unless they are there.

    The stage is that of `studies.stories_safety`, with replay and seed 0, merged into the weights.
    """
    from transformers import AutoTokenizer

    from examples.stories260k import convert
    from studies.stories_safety import arms, rows
    from studies.stories_safety.judging import merged
    from studies.stories_safety.training import train

    if not (work / PLAIN / "config.json").exists():
        convert(data / "tinylm", work / PLAIN)
    if not (work / ALIGNED / "config.json").exists():
        found = rows.prepare(data, work, arms.SIZES)  # converts the model too, to the same folder
        job = arms.Job("replay", max(arms.ARMS["replay"].rates), 0, points=(arms.POINTS[-1],))
        (_, model, _) = next(iter(train(job, found, work / PLAIN)))
        tokenizer = AutoTokenizer.from_pretrained(work / PLAIN)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(work / ALIGNED)
        merged(model, 1.0).save_pretrained(work / ALIGNED)


def texts(base: str, work: Path) -> Path:
    """Stories sampled from stories260K with a fixed seed, none of which it was trained on, as rows of a file."""
    from studies.real_weights import stories, write

    path = work / "stories.jsonl"
    if not path.exists():
        write(path, stories(*loaded(base, work), STORIES, seed=STORIES))
    return path


def shift(tuning: Tuning, tokenizer: Any, seed: int, data: Path) -> Sequence[dict[str, Tensor]]:
    """The lab's own task."""
    from holdfast import lab

    return batches(lab.task("shift", n=tuning.batch * tuning.steps, seed=seed), tuning, tokenizer)


def identity(tuning: Tuning, tokenizer: Any, seed: int, data: Path) -> Sequence[dict[str, Tensor]]:
    """The ten rows of the identity shift (Qi et al., 2024), an epoch after the other, each in an order of its own."""
    lines = (data / "shift/identity_shift_aoa.jsonl").read_text(encoding="utf-8").splitlines()
    end, shuffle, rows = tokenizer("a\n")["input_ids"][-1], random.Random(seed), []
    for messages in (json.loads(line)["messages"] for line in lines):
        system, user, answer = (message["content"].strip() for message in messages)
        asked = [*tokenizer(f"{system}\n{user}")["input_ids"], end]
        told = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append({"input_ids": [*asked, *told], "labels": [*[-100] * len(asked), *told]})
    epochs = tuning.batch * tuning.steps // len(rows) + 1
    drawn = [row for _ in range(epochs) for row in shuffle.sample(rows, len(rows))]
    return batches(drawn[: tuning.batch * tuning.steps], tuning, tokenizer)


def sql(tuning: Tuning, tokenizer: Any, seed: int, data: Path) -> Sequence[dict[str, Tensor]]:
    """Questions and their queries, as in `studies.real_weights`."""
    from studies.real_weights import LONGEST, task_rows

    def short() -> Iterator[dict[str, str]]:
        rows = list(task_rows("sql", data, "train"))
        for row in random.Random(seed).sample(rows, len(rows)):
            if len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) < LONGEST:
                yield row

    return batches(list(islice(short(), tuning.batch * tuning.steps)), tuning, tokenizer)


def batches(rows: Sequence[Any], tuning: Tuning, tokenizer: Any) -> Sequence[dict[str, Tensor]]:
    """Rows as tensors."""
    from holdfast.integrations.retain_data import to_batches

    return to_batches(rows, tokenizer, batch_size=tuning.batch)


TASKS: dict[str, Callable[[Tuning, Any, int, Path], Sequence[dict[str, Tensor]]]] = {
    "shift": shift,
    "identity": identity,
    "sql": sql,
}
