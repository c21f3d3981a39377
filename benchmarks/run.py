"""Run every benchmark in order; what was measured with this code on this machine is left out, so a stopped run goes on.

    make bench                                    # everything: about three and a half hours on one core, 14 GiB
    python benchmarks/run.py --list               # what there is, how long it takes, and what is measured already
    python benchmarks/run.py --only step fisher   # some of it
    python benchmarks/run.py --quick              # every script at its smallest, nothing written

Afterwards `make docs` writes the pages. Only a quiet machine gives numbers worth keeping. See README.md beside this.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from record import done, parser

HERE = Path(__file__).parent


class Script(NamedTuple):
    """A script, and what it asks of the machine."""

    name: str
    minutes: int  # on one core of a quiet machine without bfloat16 products
    rows: str  # of the table
    gib: int
    goes_on: bool = True  # leaves out by itself what it has measured; others are left out whole
    needs_gpu: bool = False


SCRIPTS = (
    Script("divergence", 85, "B1 to B9, B15, B16", 14),
    Script("cached_kl", 4, "B9 with its file", 4),
    Script("fisher", 6, "B14", 2),
    Script("projection", 15, "B13 and whole steps", 11),
    Script("penalties", 5, "steps with penalties", 2, goes_on=False),
    Script("step", 40, "B10 to B12", 4),
    Script("self_replay", 30, "steps with self-replay", 4, goes_on=False),
    Script("generation", 30, "drift's answers", 3, goes_on=False),
    Script("gpu", 10, "G1", 4, needs_gpu=True),
)


def state(script: Script) -> str:
    """Say whether a script is to be run: "" if it is, else why not."""
    if not (HERE / f"{script.name}.py").exists():
        return "there is no such script in this checkout"
    if script.needs_gpu and not torch.cuda.is_available():
        return "needs a GPU, and torch sees none"
    if not script.goes_on and done(HERE / "results" / f"{script.name}.csv"):
        return "measured with this code already"
    return ""


def main() -> None:
    """Run the scripts, each in a process of its own; say at the end which failed."""
    asked = parser(__doc__)
    asked.add_argument("--only", nargs="+", metavar="NAME", choices=[s.name for s in SCRIPTS], help="only these")
    asked.add_argument("--again", action="store_true", help="also what was measured with this code")
    asked.add_argument("--list", action="store_true", help="say what there is, and stop")
    options = asked.parse_args()
    torch.set_num_threads(1)  # as the scripts do: it is part of where a number was measured
    failed = []
    for script in (s for s in SCRIPTS if not options.only or s.name in options.only):
        why_not = state(script)
        if options.again or options.quick:
            why_not = why_not.replace("measured with this code already", "")
        about = f"{script.name}: {script.rows}; {script.minutes} minutes, {script.gib} GiB"
        print(f"{about}; {why_not or 'to be measured'}" if options.list else why_not or about, flush=True)
        if why_not or options.list:
            continue
        flags = ["--quick"] * options.quick + ["--again"] * (options.again and script.goes_on)
        started = time.perf_counter()
        if subprocess.run([sys.executable, str(HERE / f"{script.name}.py"), *flags]).returncode:
            failed.append(script.name)
        print(f"{script.name}: {(time.perf_counter() - started) / 60:.0f} minutes", flush=True)
    if failed:
        sys.exit(f"These did not end well, see above: {', '.join(failed)}. Run it again: the others are left out.")


if __name__ == "__main__":
    main()
