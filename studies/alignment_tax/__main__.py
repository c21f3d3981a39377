"""The command line of the study; read the package's own docstring for how it is used."""

from __future__ import annotations

import argparse
from pathlib import Path

from studies import alignment_tax

from .arms import ARMS, STAGES
from .cost import measure
from .page import page
from .sweep import jobs, publish, run

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "alignment-tax"


def main() -> None:
    """Run the experiment, time its arms (with nothing else on the machine), or write its page."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.alignment_tax",
        description=alignment_tax.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=("run", "cost", "page"))
    parser.add_argument("--pipeline", nargs="+", choices=list(STAGES), default=["sft"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/alignment-tax"), help="where the whole ledger lies")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.verb == "run":
        run(jobs(args.pipeline, args.seeds, args.arms), args.work / "ledger.jsonl", args.jobs)
        publish(args.work / "ledger.jsonl", args.results / "ledger.jsonl")
    elif args.verb == "cost":
        measure(args.pipeline, args.arms, args.work / "ledger.jsonl")
        publish(args.work / "ledger.jsonl", args.results / "ledger.jsonl")
    else:
        written = page(args.results / "ledger.jsonl", args.results)
        (args.results.parents[1] / "alignment-tax.md").write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
