"""The figure of docs/speed.md: a training step with each method as a multiple of plain LoRA's, one bar each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from holdfast.analysis.figure import FAINT, INK, STYLE
from holdfast.analysis.panels import COLOURS
from matplotlib.figure import Figure
from matplotlib.patches import Patch

SPACES = {"output": COLOURS[1], "weight": COLOURS[3], "gradient": COLOURS[2]}
Bar = tuple[str, str, float | None]  # method, space, ratio: None where it was not measured


def cost_figure(bars: Sequence[Bar]) -> Figure:
    """Draw the bars from plain LoRA's 1 on, the cheapest on top; what was not measured stays empty, and says so."""
    ordered = sorted(bars, key=lambda bar: (bar[2] is None, bar[2] or 0.0))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 0.36 * len(ordered) + 1.5), dpi=160, layout="constrained")
        axes = figure.subplots()
        for place, (_, space, ratio) in enumerate(ordered):
            if ratio is None:
                axes.text(1.01, place, "not measured", va="center", color=FAINT)
                continue
            axes.barh(place, ratio - 1, left=1, height=0.62, color=SPACES[space])
            axes.text(max(ratio, 1) + 0.01, place, f"{ratio:.2f}×", va="center", fontweight="bold")
        axes.axvline(1, color=INK, linewidth=1.2)
        axes.set_yticks(range(len(ordered)), [method for method, _, _ in ordered])
        axes.set_ylim(len(ordered) - 0.4, -0.6)
        axes.set_xlim(min([0.98, *(r for *_, r in ordered if r)]), 1.12 * max([1.05, *(r for *_, r in ordered if r)]))
        axes.set_xlabel("time of a training step, plain LoRA = 1")
        axes.tick_params(length=0)
        figure.legend(
            handles=[Patch(color=colour, label=f"{space} methods") for space, colour in SPACES.items()],
            title="What a step costs", title_fontproperties={"size": 13, "weight": "bold"}, alignment="left",
            loc="outside upper left", ncols=3, frameon=False,
        )  # fmt: skip
    return figure


def cost_png(bars: Sequence[Bar], path: Path) -> None:
    """Write the figure; the same bars give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        cost_figure(bars).savefig(path, metadata={"Software": None})
