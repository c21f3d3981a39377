"""Tables as text, for papers and pages: comparisons at matched learning in Markdown or LaTeX, generated, never typed.

Read next: `holdfast.analysis.report`, the whole page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from holdfast.analysis.frontier import Comparison

LATEX = {
    "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "–": "--", "±": r"$\pm$",
    "×": r"$\times$",
} | {sign: f"\\{sign}" for sign in "&%$#_{}"}  # fmt: skip


def comparison_rows(comparisons: Sequence[Comparison]) -> list[dict[str, str]]:
    """One row for each comparison, as text; the columns are the keys, in order.

    Args:
        comparisons: of `frontier.compare`.
    """
    rows = []
    for found in comparisons:
        mine, theirs = (found.kind.show(mean) if found.seeds else "–" for mean in found.means)
        rows.append(
            {
                "score": found.kind.title,
                f"at {found.arm.learned.title}": found.arm.learned.show(found.arm.level),
                "arm": found.arm.arm,
                "value": mine,
                found.baseline.arm: theirs,
                "difference": found.numbers,
                "verdict": found.verdict,
                "seeds that reach it": found.arm.reached,
                "settings tried": str(found.arm.tried[0]),
                "points": str(found.arm.tried[1]),
            }
        )
    return rows


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same keys as a Markdown table.

    >>> print(markdown_table([{"arm": "plain LoRA", "skills": 0.52}]))
    | arm | skills |
    | --- | --- |
    | plain LoRA | 0.52 |
    """
    if not rows:
        return ""
    cells = [[*row.values()] for row in rows]
    lines: list[list[object]] = [[*rows[0]], ["---"] * len(rows[0]), *cells]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def latex_table(rows: Sequence[Mapping[str, object]]) -> str:
    r"""Rows with the same keys as a LaTeX tabular (booktabs).

    >>> print(latex_table([{"arm": "plain_LoRA", "skills": 0.52}]))
    \begin{tabular}{ll}
    \toprule
    arm & skills \\
    \midrule
    plain\_LoRA & 0.52 \\
    \bottomrule
    \end{tabular}
    """
    if not rows:
        return ""
    cells: list[list[object]] = [[*rows[0]], *([*row.values()] for row in rows)]
    lines = [
        " & ".join("".join(LATEX.get(letter, letter) for letter in str(cell)) for cell in line) + r" \\"
        for line in cells
    ]
    begin, end = rf"\begin{{tabular}}{{{'l' * len(rows[0])}}}", r"\end{tabular}"
    return "\n".join([begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", end])
