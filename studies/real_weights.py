"""Does Target-Masked KL keep a real model's stories better than plain LoRA, at equal learning? Three seeds, two tasks.

    HOLDFAST_DATA=... python -m studies.real_weights run  [--task sql] [--seeds 0 1 2] [--steps 200]
    python -m studies.real_weights page                    # docs/real-weights.md from the ledger

stories260K (see examples/stories260k.py) learns WikiSQL or GSM8K, every run through `holdfast train`. The target loss
is that of held-out answers; the story loss that of stories sampled afresh from the base itself. Both arms sweep their
learning rate over as many settings, and plain LoRA may also be scaled down afterwards; fronts are chosen on validation
rows and read on test rows (holdfast.analysis.frontier). Killed and started again, it goes on. Data stays outside the
repository.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "real-weights"
TASKS = {"sql": "WikiSQL: a question to a query", "gsm8k": "GSM8K: the last sentence to the first step"}
SETTINGS: dict[str, list[dict[str, float]]] = {
    "plain LoRA": [{"learning_rate": rate} for rate in (1e-4, 3e-4, 6e-4, 1e-3, 2e-3, 3e-3)],
    "target_masked_kl": [{"learning_rate": r, "strength": s} for r, s in product((1e-4, 3e-4, 1e-3), (0.3, 1.0))],
}
SCALES = (0.3, 0.5, 0.7, 0.85, 1.0)
LONGEST = 80  # tokens of a row
RECIPE = """\
# written by studies/real_weights.py
experiment: {task}
arm: {arm}
model: {{name: stories260K, lora: {{r: 8, lora_alpha: 16}}}}
stages:
  - trainer: sft
    data: {task}-train.jsonl
    learning_rate: {learning_rate}
    max_steps: {steps}
    lr_scheduler_type: constant_with_warmup
    warmup_steps: 10
    per_device_train_batch_size: 8
    per_device_eval_batch_size: 64
    max_length: {longest}
    save_strategy: "no"
    disable_tqdm: true
    logging_steps: 100
methods: {methods}
evaluate:
  scales: {scales}
  validation: {{target: {task}-validation.jsonl, story: story-validation.jsonl}}
  test: {{target: {task}-test.jsonl, story: story-test.jsonl}}
seed: {seed}
output: {output}
ledger: {ledger}
"""


def task_rows(task: str, data: Path, part: str) -> Iterator[dict[str, str]]:
    """Yield prompt and completion; validation rows are the end of the training file."""
    names = {
        "sql": ("shift/wikisql_train_8000.jsonl", "shift/wikisql_test_1000.jsonl"),
        "gsm8k": ("capability/gsm8k_train.jsonl", "capability/gsm8k_test_first900.jsonl"),
    }
    lines = (data / names[task][part == "test"]).read_text(encoding="utf-8").splitlines()
    chosen = {"train": lines[:-1000], "validation": lines[-1000:], "test": lines}[part]
    for row in map(json.loads, chosen):
        if task == "sql":
            yield {"prompt": row["question"].strip() + "\n", "completion": " ".join(row["sql"].split())}
        else:
            question = re.split(r"(?<=[.!?])\s+", row["question"].strip())[-1]
            step = re.sub(r"<<.*?>>", "", row["answer"]).split("\n")[0].strip()
            yield {"prompt": question + "\n", "completion": step}


def stories(model, tokenizer, n: int, seed: int) -> list[dict[str, str]]:
    """Sample stories from the base itself at temperature 1: none of them was ever trained on."""
    import torch

    torch.manual_seed(seed)
    found: list[dict[str, str]] = []
    while len(found) < n:
        ids = model.generate(
            torch.ones(64, 1, dtype=torch.long), max_new_tokens=LONGEST + 10, do_sample=True, top_k=0, temperature=1.0
        )
        whole = [row for row in ids if not (row[1:] <= 2).any()]  # not ended: cut at LONGEST, no end is missing
        found += [{"text": tokenizer.decode(row, skip_special_tokens=True)} for row in whole]
    return found[:n]


def prepare(data: Path, sizes: dict[str, int]) -> None:
    """Write the model, the tasks' rows and the stories into the working folder, unless they are there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.stories260k import convert

    folder = convert(data / "tinylm", Path("stories260K"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for part, n in sizes.items():
        for task in TASKS:
            rows = (
                row
                for row in task_rows(task, data, part)
                if len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) < LONGEST
            )
            write(Path(f"{task}-{part}.jsonl"), [row for row, _ in zip(rows, range(n), strict=False)])
        if part != "train" and not Path(f"story-{part}.jsonl").exists():
            write(Path(f"story-{part}.jsonl"), stories(model, tokenizer, n, seed=n))


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    temporary = path.with_suffix(".unfinished")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(path)


def run(data: Path, work: Path, tasks: list[str], seeds: list[int], steps: int, sizes: dict[str, int]) -> Path:
    """Run every setting of both arms through `holdfast train`; return the ledger."""
    from holdfast.cli import app

    work.mkdir(parents=True, exist_ok=True)
    os.chdir(work)
    prepare(data, sizes)
    ledger = Path("ledger.jsonl")
    for task, seed, (arm, settings) in product(tasks, seeds, SETTINGS.items()):
        for setting in settings:
            strength = setting.get("strength")
            methods = "[]" if strength is None else f"[{{target_masked_kl: {{strength: {strength}}}}}]"
            name = "-".join([task, *map(str, setting.values()), str(seed), str(steps)])
            recipe = Path(f"{name}.yaml")
            recipe.write_text(
                RECIPE.format(
                    task=task, arm=arm, learning_rate=setting["learning_rate"], steps=steps, methods=methods,
                    scales=list(SCALES), seed=seed, output=f"runs/{name}", ledger=ledger, longest=LONGEST,
                )
            )  # fmt: skip
            app(["train", str(recipe)], standalone_mode=False)
    return work / ledger


def publish(source: Path, target: Path) -> None:
    """Copy a ledger without the per-row results that no interval needs: those of validation rows, and digits."""
    from dataclasses import replace

    from holdfast.drift.ledger import Ledger

    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    slim = Ledger(target)
    for entry in Ledger(source).entries():
        scores = {
            name: replace(score, items=tuple(round(x, 4) for x in score.items or ()) if entry.split == "test" else None)
            for name, score in entry.scores.items()
        }
        slim.append(replace(entry, scores=scores))


def shown(reading) -> str:
    """A reading's mean, or a dash where no seed reaches the level."""
    return f"{reading.mean:.3f}" if reading.values else "–"


def page(ledger: Path) -> str:
    """Return the page that the ledger speaks for."""
    from holdfast.analysis.frontier import at_matched_learning, compare, matched_levels, settings_tried
    from holdfast.analysis.scores import ScoreKind
    from holdfast.drift.ledger import Ledger

    kinds = {
        "target_loss": ScoreKind("Target loss", False, ".3f"),
        "story_loss": ScoreKind("Story loss", False, ".3f"),
    }
    lines = [TOP]
    for task, title in TASKS.items():
        entries = Ledger(ledger).entries(task)
        if not entries:
            continue
        levels = matched_levels(entries, "plain LoRA", "target_loss", fractions=(0.5, 0.75, 0.9, 0.95), kinds=kinds)
        readings = at_matched_learning(entries, "target_loss", ["story_loss"], levels, kinds=kinds)
        base = next(e.scores for e in entries if e.arm == "base" and e.split == "test")
        tried = ", ".join(
            f"{arm} {n} settings, {m} with scales" for arm, (n, m) in settings_tried(entries).items() if arm != "base"
        )
        seeds = len({e.seed for e in entries})
        lines += [
            f"## {title}\n",
            f"Base: target loss {base['target_loss'].value:.3f}, story loss {base['story_loss'].value:.3f}. "
            f"{seeds} seeds. Tried: {tried}.\n",
            "| target loss | plain LoRA, scaled | Target-Masked KL | difference [95 %] | seeds | verdict |",
            "|---|---|---|---|---|---|",
        ]
        compared = compare(readings, "plain LoRA", kinds=kinds)
        for one in compared:
            lines.append(
                f"| {one.arm.level:.2f} | {shown(one.baseline)} | {shown(one.arm)} | {one.numbers} | "
                f"{len(one.seeds)} | {one.verdict} |"
            )
        found: dict[str, list[str]] = {}
        for one in compared:
            found.setdefault(one.verdict, []).append(f"{one.arm.level:.2f}")
        told = "; ".join(f"{verdict} at target loss {', '.join(levels)}" for verdict, levels in found.items())
        lines.append(f"\n**In plain words:** Target-Masked KL against scaled plain LoRA, on the stories: {told}.\n")
        ends = [e for e in entries if e.split == "test" and e.settings.get("scale") == 1.0]
        for arm in SETTINGS:
            each = [e.cost["train_cpu_seconds"] for e in ends if e.arm == arm and "train_cpu_seconds" in e.cost]
            if each:
                lines.append(f"A run of {arm} takes {sum(each) / len(each):.0f} CPU seconds (mean of {len(each)}).")
        lines.append("")
    return "\n".join(lines) + BOTTOM


TOP = """\
# Real weights: stories260K learns SQL and arithmetic

<!-- written by `python -m studies.real_weights page` from docs/results/real-weights/ledger.jsonl: do not edit -->

stories260K is a real pretrained model: 260 thousand parameters, trained on TinyStories (llama2.c, MIT). It tells
stories; here it learns WikiSQL or GSM8K with LoRA (r = 8, AdamW, 200 steps of 8 rows), with and without
Target-Masked KL. What it should not lose is its stories: the loss on stories sampled afresh from the base.
Whatever learns less forgets less, so arms are compared at equal target loss on held-out rows; plain LoRA may also be
scaled down after training, the strongest simple baseline. Lower is better everywhere. A difference below zero means
that Target-Masked KL keeps the stories better; "within noise" means that the interval covers zero.
"""
BOTTOM = """
## Run it

    HOLDFAST_DATA=... make real          # python -m studies.real_weights run, then page

Limits: one small model, three seeds, one rank, 200 steps; fronts are interpolated between adapter scales. The levels
of target loss lie 50, 75, 90 and 95 % of the way from the base to the best that plain LoRA reaches on validation rows.
Each level is judged by itself, so of many verdicts some may be chance. The sweep was widened once, from 4 settings of
each arm to 6: plain LoRA had been tried at rates down to 1e-4, Target-Masked KL only down to 3e-4, and on WikiSQL it
then came out worse at the first two levels and within noise at the others. It still stops at 1e-3 where plain LoRA
goes on to 3e-3, so "not reached" may mean a rate that was not tried.
"""


def main() -> None:
    """Run the experiment, or write its page."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.real_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=("run", "page"))
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "holdfast-real-weights")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.verb == "run":
        if "HOLDFAST_DATA" not in os.environ:
            parser.error("HOLDFAST_DATA is not set: it must name the folder with tinylm/, shift/ and capability/")
        data = Path(os.environ["HOLDFAST_DATA"]).resolve()
        sizes = {"train": 2400, "validation": 128, "test": 256}
        ledger = run(data, args.work, args.task, args.seeds, args.steps, sizes)
        publish(ledger, args.results / "ledger.jsonl")
    else:
        (args.results.parents[1] / "real-weights.md").write_text(page(args.results / "ledger.jsonl"))


if __name__ == "__main__":
    main()
