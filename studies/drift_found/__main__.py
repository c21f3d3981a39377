"""The command line of the study; read the package's own docstring for how it is used."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from studies import drift_found

from .page import page
from .running import SEEDS, parts, publish, run

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "drift"


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.drift_found",
        description=drift_found.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=("run", "page"))
    parser.add_argument("--only", nargs="+", choices=list(parts(Path(), Path())), default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--work", type=Path, default=Path("runs/drift-found"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.verb == "run":
        if "HOLDFAST_DATA" not in os.environ:
            parser.error("HOLDFAST_DATA is not set: it must name the folder with tinylm/, safety/, benign/ and shift/")
        import torch

        torch.set_num_threads(1)
        data = Path(os.environ["HOLDFAST_DATA"]).resolve()
        publish(run(data, args.work, args.seeds, args.only), args.results / "ledger.jsonl")
    (args.results / "README.md").write_text(page(args.results / "ledger.jsonl"), encoding="utf-8")


if __name__ == "__main__":
    main()
