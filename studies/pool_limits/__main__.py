"""The command line of the study; read the package's own docstring for how it is used."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from studies import pool_limits

from .arms import ARMS, SCENARIOS, jobs
from .page import page
from .sweep import publish, run

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "pool-limits"


def main() -> None:
    """Run the experiment, or write its page."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.pool_limits",
        description=pool_limits.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=("run", "page"))
    parser.add_argument("--scenario", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "holdfast-pool-limits")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    work = args.work.resolve()
    ledger, published = work / "ledger.jsonl", args.results / "ledger.jsonl"
    if args.verb == "page":
        written = page(published, args.results)
        (args.results.parents[1] / "pool-limits.md").write_text(written, encoding="utf-8")
        return
    run(jobs(args.scenario, args.seeds, args.arms, work), ledger, args.jobs)
    publish(ledger, published)


if __name__ == "__main__":
    main()
