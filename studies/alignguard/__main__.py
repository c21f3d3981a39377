"""The command line of the study; read the package's own docstring for how it is used."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from studies import alignguard

from . import story_rows
from .arms import ARMS, LAB, SCENARIOS, jobs
from .cost import measure
from .page import page
from .sweep import publish, run

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "alignguard"


def main() -> None:
    """Run the experiment, time its arms (with nothing else on the machine), or write its page."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.alignguard",
        description=alignguard.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=("run", "cost", "page"))
    parser.add_argument("--scenario", nargs="+", choices=list(SCENARIOS), default=list(LAB))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "holdfast-alignguard")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    work = args.work.resolve()
    ledger, published = work / "ledger.jsonl", args.results / "ledger.jsonl"
    if args.verb == "page":
        written = page(published, args.results)
        (args.results.parents[1] / "alignguard.md").write_text(written, encoding="utf-8")
        return
    if "stories" in args.scenario:
        if "HOLDFAST_DATA" not in os.environ:
            parser.error("HOLDFAST_DATA is not set: it must name the folder with tinylm/, shift/ and capability/")
        story_rows.prepare(Path(os.environ["HOLDFAST_DATA"]).resolve(), work)
    if args.verb == "run":
        run(jobs(args.scenario, args.seeds, args.arms, work), ledger, args.jobs)
    else:
        measure(args.scenario, args.arms, ledger, work)
    publish(ledger, published)


if __name__ == "__main__":
    main()
