"""The command line of the study; read the package's own docstring for how it is used."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from studies import stories_safety

from .arms import ARMS, SEEDS
from .page import page
from .sweep import jobs, publish, run

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "stories-safety"


def main() -> None:
    """Run the experiment, or write its page."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.stories_safety",
        description=stories_safety.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=("run", "page"))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "holdfast-stories-safety")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.verb == "run":
        if "HOLDFAST_DATA" not in os.environ:
            parser.error("HOLDFAST_DATA is not set: it must name the folder with tinylm/, safety/, benign/ and text/")
        ledger = run(jobs(args.arms, args.seeds), Path(os.environ["HOLDFAST_DATA"]).resolve(), args.work)
        publish(ledger, args.results / "ledger.jsonl")
    else:
        written = page(args.results / "ledger.jsonl", args.results)
        (args.results.parents[1] / "stories-safety.md").write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
