"""The command line of the study; read the package's own docstring for how it is used."""

from __future__ import annotations

import argparse
import os
from contextlib import chdir
from pathlib import Path

from studies import results

from .comparisons import STUDIES
from .page import write_pages
from .rows import prepare
from .runs import publish, run


def main() -> None:
    """Prepare rows, run comparisons, or write the pages."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.results",
        description=results.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=("prepare", "run", "page"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to run: {', '.join(STUDIES)}; all")
    parser.add_argument("--work", type=Path, default=Path(), help="the folder in which runs/ lies; this one")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--seeds", type=int, default=3, help="at most so many of each comparison; 1 is a first look")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in STUDIES]:
        parser.error(f"there is no comparison {', '.join(unknown)}; there are {', '.join(STUDIES)}")
    work, data = args.work.resolve(), os.environ.get("HOLDFAST_DATA")
    if args.verb == "prepare":
        with chdir(work):
            prepare(Path(data).resolve() if data else None)
        if not data:
            print("HOLDFAST_DATA is not set: only the lab's rows were written, not those of stories260K.")
    elif args.verb == "run":
        run(args.names or list(STUDIES), work, args.processes, args.seeds)
    else:
        publish(work)
        print("\n".join(map(str, write_pages())))


if __name__ == "__main__":
    main()
