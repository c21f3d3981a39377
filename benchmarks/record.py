"""How a benchmark is recorded: what ran where, one CSV in long form, and the memory of this process."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch


def process_mib(field: str) -> float:
    """Return a field of /proc/self/status in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def provenance() -> dict[str, object]:
    """Say what ran where."""
    root = Path(__file__).parent.parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True
    ).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain", "src"], cwd=root, capture_output=True, text=True).stdout
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "trl")]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit + ("+uncommitted" if dirty else ""),
        "machine": f"{cpu[0].split(':')[1].strip()} ({len(cpu)} cores, shared), {platform.system()}",
        "threads": torch.get_num_threads(),
        "versions": ", ".join(versions),
    }


def write(rows: list[dict[str, object]], path: Path) -> None:
    """Write in long form. A row measured again replaces its older self; the others keep their date and commit."""
    source = provenance()
    columns = ["dtype", "tokens", "variant", "peer", "metric", "value", "rounds", *source]
    table = {}
    if path.exists():
        with path.open(newline="") as file:
            table = {tuple(row[c] for c in columns[:5]): row for row in csv.DictReader(file)}
    for row in rows:
        full = {c: str(row.get(c, "")) for c in columns} | {k: str(v) for k, v in source.items()}
        table[tuple(full[c] for c in columns[:5])] = full | {"value": f"{row['value']:.4g}"}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())
