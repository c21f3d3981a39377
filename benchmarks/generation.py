"""What drift's greedy answers cost: in batches against one by one, and against transformers' own `generate`.

    python benchmarks/generation.py                       # the committed table: about half an hour on one core
    python benchmarks/generation.py --quick               # tiny shapes, nothing written
    python benchmarks/generation.py --only lab            # or: --only 0.5B; the other rows stay as they are

The difference to `generate` with the same left padding is the rule for near ties, which makes answers the same in every
batch; the script counts the answers that are not. See README.md beside this.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from holdfast import lab
from holdfast.drift.generation import Ids, greedy
from holdfast.drift.models import chat_ids
from holdfast.drift.suite import suite
from holdfast.lab.probes import ANSWER_TOKENS, twins
from record import process_mib, write
from tokenizers import Tokenizer, models
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

RESULTS = Path(__file__).parent / "results" / "generation.csv"
OURS, PLAIN = "holdfast greedy", "transformers generate"
TEMPLATE = 30  # tokens that Qwen2.5's chat template and its system prompt put around a request
Answers = dict[Ids, Ids]


class Subject(NamedTuple):
    """A model, what it is asked, and in how many prompts at a time."""

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    prompts: list[Ids]
    length: int
    sizes: tuple[int, ...]


def random_qwen(n: int, *, tiny: bool = False) -> Subject:
    """The shape of Qwen2.5-0.5B with random weights, asked `n` prompts of the core suite by their lengths alone.

    A prompt is random tokens, as many as the request has words and marks, and the template's. Taken evenly from short
    to long, a batch has more padding than in a run, where all prompts are sorted first.
    """
    torch.manual_seed(0)
    vocab = 1000 if tiny else 151_936
    shape = {"hidden_size": 56, "intermediate_size": 304, "num_hidden_layers": 2} if tiny else {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24
    }  # fmt: skip
    config = Qwen2Config(
        vocab_size=vocab, num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True, **shape
    )
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1", pad_token="t2")
    lengths = sorted(TEMPLATE + len(re.findall(r"\w+|[^\w\s]", prompt.text)) for prompt in suite("core").prompts)
    chosen = [lengths[i * len(lengths) // n] for i in range(n)]
    prompts = [tuple(torch.randint(3, vocab, (length,)).tolist()) for length in chosen]
    return Subject("0.5B", Qwen2ForCausalLM(config).eval(), tokenizer, prompts, 16, (1, 8, 32))


def lab_model(dtype: torch.dtype = torch.float32, n: int | None = None) -> Subject:
    """The lab's aligned model and its own twins."""
    model, tokenizer = lab.load("lab-aligned", dtype=dtype)
    prompts = {tuple(chat_ids(tokenizer, prompt.text)) for prompt in twins().prompts}
    ordered = sorted(prompts, key=lambda ids: (len(ids), ids))
    return Subject("lab", model.eval(), tokenizer, ordered[:n], ANSWER_TOKENS, (1, 16, 128))


@contextmanager
def decided_alone(model: nn.Module) -> Iterator[list[int]]:
    """Count forwards without a cache: `generate` makes none, the rule for ties makes one for every row it decides."""
    found: list[int] = []

    def count(_model: nn.Module, _args: object, options: dict[str, object]) -> None:
        if options.get("use_cache") is False:
            found.append(1)

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


@torch.no_grad()
def answers(variant: str, subject: Subject, prompts: Sequence[Ids], size: int) -> Answers:
    """The answers' tokens, by prompt."""
    model, tokenizer, found = subject.model, subject.tokenizer, {}
    if variant == OURS:
        for batch in greedy(model, tokenizer, prompts, subject.length, size):
            found |= {prompt: reply.tokens for prompt, reply in batch.items()}
        return found
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    plain = GenerationConfig(max_new_tokens=subject.length, do_sample=False, pad_token_id=pad, eos_token_id=end)
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        longest = max(map(len, batch))
        ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in batch])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch])
        written = model.generate(input_ids=ids, attention_mask=mask, generation_config=plain)[:, longest:].tolist()
        for row, tokens in zip(batch, written, strict=True):
            found[row] = tuple(tokens[: tokens.index(end) + 1] if end in tokens else tokens)
    return found


def measure(subject: Subject, rounds: int, alone_rounds: int) -> list[dict[str, object]]:
    """Time every variant at every batch size in turn, and compare its answers with those it gives one by one.

    One by one, a round takes every `alone_rounds`-th prompt, and the next round the ones beside them: after so many
    rounds all have been asked.
    """
    arms = [(variant, size) for size in subject.sizes for variant in (OURS, PLAIN)]
    cpu: dict[tuple[str, int], list[float]] = {arm: [] for arm in arms}
    wall: dict[tuple[str, int], list[float]] = {arm: [] for arm in arms}
    said: dict[tuple[str, int], Answers] = {arm: {} for arm in arms}
    alone: dict[int, int] = {}
    for variant, size in arms:
        answers(variant, subject, subject.prompts[: min(size, 2)], size)
    for turn in range(rounds):
        for variant, size in arms:
            prompts = subject.prompts[turn % alone_rounds :: alone_rounds] if size == 1 else subject.prompts
            with decided_alone(subject.model) as forwards:
                started, started_wall = time.process_time(), time.perf_counter()
                found = answers(variant, subject, prompts, size)
                cpu[variant, size].append((time.process_time() - started) / len(prompts))
                wall[variant, size].append((time.perf_counter() - started_wall) / len(prompts))
            if variant == OURS and turn < (alone_rounds if size == 1 else 1):
                alone[size] = alone.get(size, 0) + len(forwards)
            said[variant, size] |= found
        print(f"{subject.name}: round {turn + 1} of {rounds}", flush=True)
    common = {"dtype": str(next(subject.model.parameters()).dtype)[6:], "tokens": subject.length, "rounds": rounds}
    return [
        *timings(subject, cpu, "cpu seconds a prompt", common),
        *timings(subject, wall, "wall seconds a prompt", common),
        *differences(subject, said, alone, common),
    ]


def timings(
    subject: Subject, found: dict[tuple[str, int], list[float]], metric: str, common: dict[str, object]
) -> list[dict[str, object]]:
    """The medians, and their ratios: to one by one, and of ours to `generate`."""
    median = {arm: statistics.median(times) for arm, times in found.items()}
    table: list[dict[str, object]] = []
    for (variant, size), seconds in median.items():
        row = {**common, "variant": label(subject, variant, size)}
        table.append({**row, "metric": metric, "value": seconds})
        ratio = {**row, "metric": f"{metric}, ratio"}
        if size != 1:
            table.append({**ratio, "peer": label(subject, variant, 1), "value": seconds / median[variant, 1]})
        if variant == OURS:
            table.append({**ratio, "peer": label(subject, PLAIN, size), "value": seconds / median[PLAIN, size]})
    return table


def differences(
    subject: Subject, said: dict[tuple[str, int], Answers], alone: dict[int, int], common: dict[str, object]
) -> list[dict[str, object]]:
    """How many answers are not those that the same variant gives one by one, and how many tokens were decided alone."""
    table: list[dict[str, object]] = []
    for (variant, size), found in said.items():
        row = {**common, "variant": label(subject, variant, size)}
        if size != 1:
            wanted = said[variant, 1]  # with fewer rounds than `alone_rounds`, not of every prompt
            peer = label(subject, variant, 1)
            others = sum(found[prompt] != tokens for prompt, tokens in wanted.items())
            table.append({**row, "peer": peer, "metric": f"answers that differ, of {len(wanted)}", "value": others})
        if variant == OURS:
            tokens = sum(map(len, found.values()))
            table.append({**row, "metric": "tokens decided alone, share", "value": alone[size] / tokens})
    return table


def label(subject: Subject, variant: str, size: int) -> str:
    """What a row of the table is called."""
    return f"{subject.name}: {variant}, batch {size}"


def memory(name: str) -> None:
    """Print, in a process of its own, what the loaded model takes and every variant's peak above it, in MiB."""
    subject = random_qwen(32) if name == "0.5B" else lab_model()
    arms = [(variant, size) for size in subject.sizes for variant in (OURS, PLAIN)]
    for variant, _ in arms:  # a token each: libraries load and allocate before we look
        answers(variant, subject._replace(length=1), subject.prompts[:1], 1)
    loaded = process_mib("VmRSS")
    print(f"{name}: loaded\tresident MiB\t{loaded}")
    for variant, size in arms:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        answers(variant, subject, subject.prompts[-size:], size)
        print(f"{label(subject, variant, size)}\tpeak MiB\t{process_mib('VmHWM') - loaded}")


def memories(name: str) -> list[dict[str, object]]:
    """Run `memory` in a process of its own."""
    length = 16 if name == "0.5B" else ANSWER_TOKENS
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # freed tensors go back to the system
    command = [sys.executable, __file__, "--child", name]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    rows = (line.split("\t") for line in printed.splitlines())
    common = {"dtype": "float32", "tokens": length}
    return [{**common, "variant": name, "metric": metric, "value": float(value)} for name, metric, value in rows]


def qwen(rounds: int) -> Iterator[list[dict[str, object]]]:
    """All rows of the 0.5B shape, a table at a time; in bfloat16 four prompts once, for what differs."""
    yield memories("0.5B")
    subject = random_qwen(32)
    yield measure(subject, rounds, alone_rounds=4)
    subject.model.to(torch.bfloat16)
    few = subject._replace(prompts=subject.prompts[::8], length=4, sizes=(1, 4))
    yield measure(few, rounds=1, alone_rounds=1)


def small(rounds: int) -> Iterator[list[dict[str, object]]]:
    """All rows of the lab's model; in bfloat16 once, for what differs."""
    yield memories("lab")
    yield measure(lab_model(), rounds, alone_rounds=4)
    yield measure(lab_model(torch.bfloat16), rounds=1, alone_rounds=1)


def main() -> None:
    """Run all tables, writing them as they grow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing written")
    parser.add_argument("--only", choices=["0.5B", "lab"], help="measure only this, and keep the other rows")
    parser.add_argument("--rounds", type=int, default=4, help="with 4, every prompt is also asked one by one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        memory(options.child)
        return
    if options.quick:
        tables = [measure(random_qwen(32, tiny=True), 2, 2), measure(lab_model(n=32), 1, 1)]
    else:
        tables = []
        parts = {"0.5B": qwen, "lab": small}
        for name, part in parts.items():
            for table in part(options.rounds) if options.only in (None, name) else ():
                write(table, RESULTS)
                tables.append(table)
    for row in (row for table in tables for row in table):
        print("\t".join(str(value) for value in row.values()))


if __name__ == "__main__":
    main()
