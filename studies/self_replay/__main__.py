"""The command line of the study; read the package's own docstring for how it is used."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from studies import self_replay

from .arms import ARMS, SCENARIOS, jobs
from .cost import measure
from .page import page
from .sweep import publish, run

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "self-replay"


def main() -> None:
    """Run the experiment, time its arms (with nothing else on the machine), or write its page."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.self_replay",
        description=self_replay.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=("run", "cost", "page"))
    parser.add_argument("--scenario", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "holdfast-self-replay")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    ledger, published = args.work.resolve() / "ledger.jsonl", args.results / "ledger.jsonl"
    if args.verb == "page":
        written = page(published, args.results)
        (args.results.parents[1] / "self-replay.md").write_text(written, encoding="utf-8")
        return
    if args.verb == "run":
        run(jobs(args.scenario, args.seeds, args.arms), ledger, args.jobs)
    else:
        measure(args.scenario, args.arms, ledger)
    publish(ledger, published)


if __name__ == "__main__":
    main()
