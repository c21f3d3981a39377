"""The command line of the study; read the package's own docstring for how it is used."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from studies import real_weights

from .arms import ARMS, TASKS, jobs
from .page import page
from .rows import complete
from .sweep import publish, run

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "real-weights"


def main() -> None:
    """Run the experiment, or write its page."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.real_weights",
        description=real_weights.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=("run", "page"))
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "holdfast-keep-stories")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.verb == "page":
        written = page(args.results / "ledger.jsonl", args.results)
        (args.results.parents[1] / "real-weights.md").write_text(written, encoding="utf-8")
        return
    if "HOLDFAST_DATA" not in os.environ:
        parser.error("HOLDFAST_DATA is not set: it must name the folder with tinylm/, shift/, capability/ and text/")
    work = args.work.resolve()
    complete(Path(os.environ["HOLDFAST_DATA"]).resolve(), work)
    run(
        [job for task in args.task for job in jobs(task, args.seeds, args.arms, work)], work / "ledger.jsonl", args.jobs
    )
    publish(work / "ledger.jsonl", args.results / "ledger.jsonl")


if __name__ == "__main__":
    main()
