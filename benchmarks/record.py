"""How a benchmark is recorded: what ran where, one CSV in long form, jobs that go on where they were, and memory.

A row of a CSV is one number; `low` and `high` are the least and the greatest of its rounds. Read next: `turns`.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from holdfast.functional.products import multiplies_bfloat16

Row = dict[str, object]
KEY = ("dtype", "shape", "tokens", "variant", "peer", "metric")
WHERE = ("machine", "threads", "versions")
CODE = ("src", "benchmarks/*.py")  # what a number depends on
NOT_INSTALLED = "not installed"
ROOT = Path(__file__).parent.parent


class NotEnoughMemory(RuntimeError):
    """A job does not fit into what is free now; its message says what to do."""


def process_mib(field: str) -> float:
    """Return a field of /proc/self/status in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak_mib(work: Callable[[], object]) -> float:
    """Return by how much the resident memory of this process grows while it works, at its highest."""
    before = process_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    work()
    return process_mib("VmHWM") - before


def need_memory(gib: float) -> None:
    """Raise `NotEnoughMemory` unless so much is free: better than to be killed half an hour later."""
    free = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
    if (found := int(free.split()[1]) / 2**20) < gib:
        raise NotEnoughMemory(f"{gib:.0f} GiB are needed and {found:.0f} GiB are free. Free some and run this again.")


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Ask git about this checkout."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def installed(*packages: str) -> Iterator[str]:
    """Name those of some packages that are here, with their versions."""
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            yield f"{name} {importlib.metadata.version(name)}"


def provenance() -> dict[str, str]:
    """Say what ran where."""
    dirty = git("status", "--porcelain", "--", *CODE).stdout.strip()
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    bfloat16 = "" if multiplies_bfloat16(torch.device("cpu")) else ", no bfloat16 products"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD").stdout.strip() + ("+uncommitted" if dirty else ""),
        "machine": f"{cpu[0].split(':')[1].strip()} ({len(cpu)} cores, shared{bfloat16}), {platform.system()}",
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join(installed("torch", "trl", "liger-kernel", "torchtune")),
    }


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a results file, none if there is no file; columns that came later are empty in old rows."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [dict.fromkeys((*KEY, "low", "high", "job"), "") | row for row in csv.DictReader(file)]


def write(rows: list[Row], path: Path, job: str = "") -> None:
    """Write in long form. A row measured again replaces its older self; the others keep their date and commit.

    Args:
        rows: with `value`, which may be a word where there is no number, and what else of the columns they know.
        path: of the CSV; written whole or not at all.
        job: that measured them; what it measured before and no more is dropped.
    """
    source = provenance()
    columns = [*KEY, "value", "low", "high", "rounds", "job", *source]
    table = {tuple(row[c] for c in KEY): row for row in read(path) if not job or row["job"] != job}
    for row in rows:
        full = {c: str(row.get(c, "")) for c in columns} | source | {"job": job}
        numbers = {c: f"{row[c]:.4g}" for c in ("value", "low", "high") if isinstance(row.get(c), float | int)}
        table.pop(tuple("" if c == "shape" else full[c] for c in KEY), None)  # itself, from before there were shapes
        table[tuple(full[c] for c in KEY)] = full | numbers
    path.parent.mkdir(exist_ok=True)
    half = path.with_suffix(".half")
    with half.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())
    half.replace(path)


def line(row: Row) -> str:
    """Return a row as a line to read."""
    value, low, high = (
        f"{row[c]:.4g}" if isinstance(row.get(c), float) else row.get(c) for c in ("value", "low", "high")
    )
    names = (str(row[c]) for c in KEY[:-1] if row.get(c))
    return f"  {' · '.join(names)} · {row['metric']}: {value}" + (f" [{low}, {high}]" if low is not None else "")


def done(path: Path, job: str = "") -> bool:
    """Say whether a job's rows were all measured with the code of now, by this machine and software.

    A commit that changed neither the package nor the benchmarks changes nothing; uncommitted code never counts.
    """
    rows, here = [row for row in read(path) if row["job"] == job], provenance()
    if not rows or here["commit"].endswith("+uncommitted"):
        return False
    same_place = all(row[c] == here[c] for row in rows for c in WHERE)
    return same_place and all(same_code(commit) for commit in {row["commit"] for row in rows})


def same_code(commit: str) -> bool:
    """Say whether the code of a commit is that of now; of an unknown one it is not."""
    return git("diff", "--quiet", commit, "--", *CODE).returncode == 0


def parser(doc: str | None, jobs: Mapping[str, object] | None = None) -> argparse.ArgumentParser:
    """Return the options that all scripts share; `jobs` are named in its help."""
    shared = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared.add_argument("--quick", action="store_true", help="the smallest shapes once, nothing written")
    if jobs is not None:
        shared.epilog = "jobs:\n" + "\n".join(f"  {job}" for job in jobs)
        shared.add_argument("--only", nargs="+", metavar="WORDS", help="only jobs whose name has one of these in it")
        shared.add_argument("--again", action="store_true", help="also what was measured with this code")
    return shared


def carry_out(jobs: Mapping[str, Callable[[], list[Row]]], path: Path, options: argparse.Namespace) -> None:
    """Run jobs in turn and write each one's rows when it is done, so that a run that was stopped goes on after them.

    Raises:
        SystemExit: If `--only` names no job, or, at the end, if a job lacked memory.
    """
    chosen = [job for job in jobs if not options.only or any(words in job for words in options.only)]
    if not chosen:
        raise SystemExit(f"--only {' '.join(options.only)} is in the name of no job. There are: {'; '.join(jobs)}.")
    lacking = []
    for number, job in enumerate(chosen, 1):
        if not (options.again or options.quick) and done(path, job):
            print(f"{job}: measured with this code already (--again measures anew)", flush=True)
            continue
        print(f"{job} ({number} of {len(chosen)})", flush=True)
        try:
            rows = jobs[job]()
        except NotEnoughMemory as short:
            print(f"{job}: left out. {short}", flush=True)
            lacking.append(job)
            continue
        print("\n".join(map(line, rows)), flush=True)
        if not options.quick:
            write(rows, path, job)
    if lacking:
        raise SystemExit(f"Not measured for want of memory: {'; '.join(lacking)}.")
