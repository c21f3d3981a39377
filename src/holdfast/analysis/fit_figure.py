"""The figure of a fit: the loss against the data, one panel for each size, points, curves and their bands.

Solid where there is data, dashed past it. Read next: `holdfast.analysis.fit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from holdfast.analysis.figure import FAINT, MARKS, STYLE
from holdfast.analysis.fit import Fit
from holdfast.analysis.panels import COLOURS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

MOST = 6
"""Panels at most: with more sizes, evenly chosen ones are shown."""


def fit_figure(fits: Mapping[str, Fit], score: str, data: str, size: str = "", factor: float = 10.0) -> Figure:
    """The figure.

    Args:
        fits: by arm.
        score: what the loss is called.
        data: what D is called.
        size: what N is called.
        factor: how far past the largest amount of data the curves go on.
    """
    sizes = np.unique(np.concatenate([found.points.size for found in fits.values()]))
    if len(sizes) > MOST:
        sizes = sizes[np.linspace(0, len(sizes) - 1, MOST).round().astype(int)]
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # its stub lists every key by name
        figure = Figure(figsize=(max(3.6 * len(sizes), 5.0), 4.2), dpi=160, layout="constrained")
        panels = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
        for axes, one in zip(panels, sizes, strict=True):
            for number, (arm, found) in enumerate(fits.items()):
                _draw(axes, arm, found, float(one), number, factor)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # needs no mathematical font
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(data)
            axes.set_title(f"{size} {one:g}" if size else "", loc="left", fontsize=10.5)
            axes.grid(True, color="#eceff1", linewidth=0.7)
            axes.set_axisbelow(True)
        panels[0].set_ylim(_ends(fits, panels[0].get_ylim()))
        panels[0].set_ylabel(score)
        handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}  # noqa: B905
        figure.legend(handles.values(), handles, loc="outside upper left", ncols=4, frameon=False)
    return figure


def _ends(fits: Mapping[str, Fit], drawn: tuple[float, float]) -> tuple[float, float]:
    """The ends of the loss axis: a band that knows nothing past the data must not press the points flat."""
    losses = np.concatenate([found.points.loss for found in fits.values()])
    room = float(np.ptp(losses)) or 0.1 * float(losses.max())
    return max(drawn[0], float(losses.min()) - 0.3 * room), min(drawn[1], float(losses.max()) + 1.5 * room)


def fit_png(
    fits: Mapping[str, Fit], path: str | Path, score: str, data: str, size: str = "", factor: float = 10.0
) -> Path:
    """Write the figure; the ending of `path` gives the format (png, svg, pdf)."""
    figure = fit_figure(fits, score, data, size, factor)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # as above
        figure.savefig(path)
    return Path(path)


def _draw(axes: Axes, arm: str, found: Fit, size: float, number: int, factor: float) -> None:
    """One arm in one panel; an arm without this size is left out, as nothing was measured there."""
    points, colour = found.points, COLOURS[number % len(COLOURS)]
    own = points.size == size
    if not own.any():
        return
    if points.base is not None:
        axes.axhline(points.base, color=FAINT, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
    mark = MARKS[number % len(MARKS)]
    axes.scatter(points.data[own], points.loss[own], s=14, marker=mark, color=colour, alpha=0.6, zorder=3)
    first, last = points.data.min(), points.data.max()
    for share in np.unique(points.injected[own]):
        for low, high, style in ((first, last, "-"), (last, last * factor, "--")):
            places = np.geomspace(low, high, 60)
            mean, lower, upper = found.curve(places, size, float(share))
            label = arm if style == "-" else "_"
            axes.plot(places, mean, style, color=colour, linewidth=2.0, label=label, zorder=4)
            axes.fill_between(places, lower, upper, color=colour, alpha=0.15, linewidth=0, zorder=2)
