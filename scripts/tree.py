"""Write the tree of src/holdfast into README.md, one line a file from its module docstring; `--check` only compares."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
START, END = "<!-- tree: make docs -->", "<!-- end of tree -->"


def first_sentence(path: Path) -> str:
    """The first line of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.split("\n")[0].rstrip(".")


def tree() -> str:
    """The tree as text."""
    source, lines = ROOT / "src" / "holdfast", []
    for folder in [source, *sorted(p for p in source.rglob("*") if (p / "__init__.py").is_file())]:
        depth = len(folder.relative_to(source).parts)
        title = first_sentence(folder / "__init__.py")
        name = "holdfast/" if folder == source else f"{folder.name}/"
        lines.append(f"{'  ' * depth}{name:{30 - 2 * depth}} {title}")
        for path in sorted(folder.glob("*.py")):
            if path.name != "__init__.py":
                lines.append(f"{'  ' * (depth + 1)}{path.name:{28 - 2 * depth}} {first_sentence(path)}")
    return "\n".join(line if len(line) <= 150 else f"{line[:149]}…" for line in lines)


def main() -> None:
    """Rewrite the README, or say that it is out of date."""
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(START)
    after = rest.split(END)[1]
    new = f"{before}{START}\n```\n{tree()}\n```\n{END}{after}"
    if "--check" in sys.argv:
        sys.exit(0 if new == readme.read_text() else "README's tree is out of date: run `make docs`.")
    readme.write_text(new)


if __name__ == "__main__":
    main()
