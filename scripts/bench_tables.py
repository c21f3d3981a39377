"""Write the tables of benchmarks into the pages that ask for them; `--check` only compares.

A page asks with `<!-- bench: self_replay.csv -->` and `<!-- end of bench -->`; what stands between is written from
benchmarks/results/self_replay.csv, with what ran where below it.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from holdfast.analysis.tables import markdown_table

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- bench: (\S+) -->\n).*?(<!-- end of bench -->)", re.S)


def table(name: str) -> str:
    """A benchmark's table in Markdown, and one line on where it was measured."""
    with (ROOT / "benchmarks" / "results" / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    shown = [
        {
            "what": row["variant"] + (f", {row['shape']}" if row.get("shape") else ""),
            "measured": row["metric"] + (f", against {row['peer']}" if row["peer"] else ""),
            "value": with_spread(row),
            "rounds": row["rounds"],
        }
        for row in rows
    ]
    places = dict.fromkeys(
        f"{row['machine']}, {row['threads']} thread, {row['versions']}, commit {row['commit']}, {row['date']}"
        for row in rows
    )
    command = f"`python benchmarks/{name.removesuffix('.csv')}.py`"
    return f"{markdown_table(shown)}\n\n{command}: {'; '.join(places)}. `make docs` writes this table.\n"


def with_spread(row: Mapping[str, str]) -> str:
    """A value with the least and the greatest of its rounds, where they were kept; a word (not installed) as it is.

    >>> with_spread({"value": "1.0316", "low": "1.01", "high": "1.06"}), with_spread({"value": "not installed"})
    ('1.03 [1.01, 1.06]', 'not installed')
    """
    value, low, high = (rounded(row.get(column) or "") for column in ("value", "low", "high"))
    return f"{value} [{low}, {high}]" if low else value


def rounded(words: str) -> str:
    """A number in three digits; a word as it is."""
    try:
        return f"{float(words):.3g}"
    except ValueError:
        return words


def with_tables(text: str) -> str:
    """A page with its tables written anew."""
    return BLOCK.sub(lambda found: f"{found[1]}{table(found[2])}{found[3]}", text)


def main() -> None:
    """Rewrite every page that asks for a table, or name those that are out of date."""
    stale = []
    for page in sorted(ROOT.glob("docs/**/*.md")):
        text = page.read_text()
        if (new := with_tables(text)) != text:
            stale.append(str(page.relative_to(ROOT)))
            if "--check" not in sys.argv:
                page.write_text(new)
    if "--check" in sys.argv and stale:
        sys.exit(f"{', '.join(stale)}: a table is out of date. Run `make docs`.")


if __name__ == "__main__":
    main()
