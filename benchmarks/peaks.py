"""Peak memory of the linear divergences and their peers: each in a process of its own, above its loaded inputs.

    peak = highest resident memory of the process - resident memory with hidden states and head in it

`divergence` runs and records it; by itself, `python benchmarks/peaks.py VARIANT SHAPE TOKENS DTYPE` prints one peak.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence

import torch
from accuracy import gradient
from peers import BEST, MISSING, PLAIN, make
from record import NOT_INSTALLED, Row, need_memory, peak_mib

PEAK, GROWTH = "peak MiB", "growth of peak, of tokens x hidden"
HELD = 10.3  # tokens x vocabulary tensors of float32 that autograd on whole logits holds at its peak


def room_for_logits(shape: str, tokens: int) -> None:
    """Raise `NotEnoughMemory` where autograd on whole logits would not fit."""
    need_memory(HELD * tokens * int(shape.split("/")[1]) * 4 / 2**30)


def peak(name: str, shape: str, tokens: int, dtype: str) -> float:
    """Return the peak of a variant in MiB, measured in a process of its own."""
    if name == PLAIN:
        room_for_logits(shape, tokens)
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # freed tensors go back to the system
    command = [sys.executable, __file__, name, shape, str(tokens), dtype]
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        sys.exit(f"{name} at {tokens} tokens ended with code {child.returncode}: see above (-9: out of memory).")
    print(f"{name}, {tokens} tokens: {float(child.stdout):.0f} MiB", flush=True)
    return float(child.stdout)


def memory(shape: str, dtype: str, runs: Sequence[tuple[str, int]], pairs: Iterable[tuple[str, str]]) -> list[Row]:
    """Measure variants at so many tokens, one at a time; then the pairs, and how the one pass grows with tokens."""
    peaks = {(name, tokens): peak(name, shape, tokens, dtype) for name, tokens in runs}
    common: Row = {"dtype": dtype, "shape": shape}
    table: list[Row] = []
    for (name, tokens), found in peaks.items():
        one: Row = {**common, "tokens": tokens, "variant": name}
        table.append({**one, "metric": PEAK, "value": found})
        for peer in (peer for mine, peer in pairs if mine == name):
            if (peer, tokens) in peaks or peer in MISSING:
                value = NOT_INSTALLED if peer in MISSING else found / peaks[peer, tokens]
                table.append({**one, "peer": peer, "metric": f"{PEAK}, ratio", "value": value})
    return table + growth(shape, dtype, {tokens: found for (name, tokens), found in peaks.items() if name == BEST})


def growth(shape: str, dtype: str, found: Mapping[int, float]) -> list[Row]:
    """Return by how much the peak grows from the fewest to the most tokens, as a share of one float32 tokens x hidden.

    That much it must grow: the gradient on the hidden states is what the pass is for.
    """
    if len(found) < 2:
        return []
    fewest, most = min(found), max(found)
    least = (most - fewest) * int(shape.split("/")[0]) * 4 / 2**20
    row: Row = {"dtype": dtype, "shape": shape, "tokens": most, "variant": BEST, "metric": GROWTH}
    return [{**row, "value": (found[most] - found[fewest]) / least}]


def main() -> None:
    """Print the peak of one variant in this process."""
    name, shape, tokens, dtype = sys.argv[1:]
    torch.set_num_threads(1)
    gradient(name, make("64/1000", 8, dtype))  # libraries load and allocate before we look
    case = make(shape, int(tokens), dtype)
    print(peak_mib(lambda: gradient(name, case)))


if __name__ == "__main__":
    main()
