"""The frontier figure: what was kept against what was learned, up and to the right is always better.

One panel for each retention score. Thick lines are means over seeds of the settings chosen on validation, read on test;
thin lines are the seeds; full dots are chosen settings, hollow ones the rest; the star is the model before tuning. The
axis of a score where lower is better is turned over. Read next: `holdfast.analysis.report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import plotly.graph_objects as go
from holdfast.analysis.panels import Panel, panels
from holdfast.analysis.scores import ScoreKind
from holdfast.drift.ledger import Entry
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from plotly.subplots import make_subplots

MARKS = ("o", "s", "D", "^", "v", "P", "X", "h")
PLOTLY_MARKS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "hexagon")
INK, FAINT, BASE_NAME = "#202124", "#9aa0a6", "base model"
STYLE: dict[str, object] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": "#bdc1c6",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def frontier_figure(
    entries: Sequence[Entry],
    retention: Sequence[str] = ("skills", "refusal", "story_perplexity"),
    adaptation: str = "adaptation",
    *,
    levels: Sequence[float] = (),
    title: str = "",
    reported: str = "test",
    chosen_on: str = "validation",
    kinds: Mapping[str, ScoreKind] | None = None,
    scaled: bool = True,
) -> Figure:
    """The still figure; `levels` of adaptation are marked. The rest as in `frontier.at_matched_learning`."""
    shown = panels(entries, retention, adaptation, reported=reported, chosen_on=chosen_on, kinds=kinds, scaled=scaled)
    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # its stub lists every key by name
        figure = Figure(figsize=(4.0 * columns, 3.5 * rows + 0.9), dpi=160, layout="constrained")
        places = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, panel in zip(places, shown, strict=False):
            _draw(axes, panel, levels)
        for axes in places[len(shown) :]:
            axes.set_visible(False)
        figure.legend(
            handles=_handles(shown[0]), title=title, title_fontproperties={"size": 13, "weight": "bold"},
            alignment="left", loc="outside upper left", ncols=2 * columns, frameon=False, columnspacing=1.6,
        )  # fmt: skip
    return figure


def frontier_png(
    entries: Sequence[Entry],
    path: str | Path,
    retention: Sequence[str] = ("skills", "refusal", "story_perplexity"),
    adaptation: str = "adaptation",
    *,
    levels: Sequence[float] = (),
    title: str = "",
    kinds: Mapping[str, ScoreKind] | None = None,
    scaled: bool = True,
) -> Path:
    """Write the still figure; the ending of `path` gives the format (png, svg, pdf)."""
    figure = frontier_figure(entries, retention, adaptation, levels=levels, title=title, kinds=kinds, scaled=scaled)
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # as above
        figure.savefig(path)
    return Path(path)


def _draw(axes: Axes, panel: Panel, levels: Sequence[float]) -> None:
    """One panel."""
    for trace in panel.traces:
        for xs, ys in trace.fronts:
            axes.plot(xs, ys, color=trace.colour, linewidth=0.7, alpha=0.35, zorder=2)
        mark = MARKS[trace.number % len(MARKS)]
        for chosen in (False, True):
            dots = [dot for dot in trace.dots if dot.chosen is chosen]
            axes.scatter(
                [dot.x for dot in dots], [dot.y for dot in dots], marker=mark, s=15, linewidths=0.7, alpha=0.6,
                zorder=3, facecolors=trace.colour if chosen else "none", edgecolors="white" if chosen else trace.colour,
            )  # fmt: skip
        axes.plot(*trace.mean, color=trace.colour, linewidth=2.4, solid_capstyle="round", zorder=4 + trace.number)
    if panel.base:
        axes.scatter(*panel.base, marker="*", s=150, color=INK, edgecolors="white", linewidths=0.8, zorder=30)
    for level in levels:
        axes.axvline(level, color=FAINT, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
    axes.set_title(panel.kind.title, loc="left", fontsize=10.5, fontweight="bold", pad=9)
    axes.set_xlabel(f"{panel.adaptation.title}{_direction(panel.adaptation)}")
    axes.set_ylabel(
        "lower is better: axis turned over" if not panel.kind.higher_is_better else "", color=FAINT, fontsize=8
    )
    axes.margins(0.06, 0.08)
    axes.grid(True, color="#eceff1", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    if not panel.kind.higher_is_better:
        axes.invert_yaxis()
    if not panel.adaptation.higher_is_better:
        axes.invert_xaxis()
    axes.annotate("better ↗", (1, 1), xytext=(0, 9), xycoords="axes fraction", textcoords="offset points", ha="right",
                  color=FAINT, fontsize=9)  # fmt: skip


def _direction(kind: ScoreKind) -> str:
    return "" if kind.higher_is_better else " (lower is better, axis turned over)"


def _handles(panel: Panel) -> list[Line2D]:
    """One legend for all panels."""
    base = [Line2D([], [], marker="*", markersize=11, color=INK, linestyle="", label=BASE_NAME)] if panel.base else []
    return base + [
        Line2D([], [], color=t.colour, marker=MARKS[t.number % len(MARKS)], markersize=4.5, linewidth=2.4, label=t.arm)
        for t in panel.traces
    ]


def frontier_html_div(
    entries: Sequence[Entry],
    retention: Sequence[str] = ("skills", "refusal", "story_perplexity"),
    adaptation: str = "adaptation",
    *,
    levels: Sequence[float] = (),
    include_plotlyjs: bool = True,
    reported: str = "test",
    chosen_on: str = "validation",
    kinds: Mapping[str, ScoreKind] | None = None,
    scaled: bool = True,
) -> str:
    """The same figure as a `<div>` that answers to the mouse; a click on an arm's name hides it in every panel.

    With `include_plotlyjs` the library travels inside (about 5 MB; nothing is loaded); a page needs it once.
    """
    shown = panels(entries, retention, adaptation, reported=reported, chosen_on=chosen_on, kinds=kinds, scaled=scaled)
    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    titles = [f"<b>{panel.kind.title}</b>" for panel in shown]
    figure = make_subplots(rows=rows, cols=columns, subplot_titles=titles, horizontal_spacing=0.07)
    for place, panel in enumerate(shown):
        row, column = place // columns + 1, place % columns + 1
        for trace in _plotly_traces(panel, first=place == 0):
            figure.add_trace(trace, row=row, col=column)
        for level in levels:
            figure.add_vline(x=level, line={"color": FAINT, "width": 1, "dash": "dot"}, row=row, col=column)
        flip = {True: None, False: "reversed"}
        figure.update_xaxes(title=panel.adaptation.title + _direction(panel.adaptation), row=row, col=column,
                            autorange=flip[panel.adaptation.higher_is_better])  # fmt: skip
        turned = "" if panel.kind.higher_is_better else "lower is better: axis turned over"
        figure.update_yaxes(title={"text": turned, "font": {"color": FAINT, "size": 11}, "standoff": 4}, row=row,
                            col=column, autorange=flip[panel.kind.higher_is_better])  # fmt: skip
    grid = {"gridcolor": "#eceff1", "zeroline": False, "linecolor": "#bdc1c6", "showline": True}
    figure.update_xaxes(**grid)
    figure.update_yaxes(**grid)
    figure.update_annotations(font_size=14)
    figure.update_layout(
        height=370 * rows + 90, margin={"l": 50, "r": 10, "t": 90, "b": 50}, hovermode="closest",
        plot_bgcolor="white", paper_bgcolor="white", font={"family": "system-ui, sans-serif", "color": INK, "size": 12},
        legend={"orientation": "h", "x": 0, "y": 1, "yref": "container", "yanchor": "top", "groupclick": "togglegroup"},
    )  # fmt: skip
    # Only these buttons: by default there is also one that sends the figure's data to a server of plotly's.
    buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]]
    config = {"displaylogo": False, "responsive": True, "showSendToCloud": False, "modeBarButtons": buttons}
    div: str = figure.to_html(full_html=False, include_plotlyjs=include_plotlyjs, config=config)
    return div


def _plotly_traces(panel: Panel, first: bool) -> list[go.Scatter]:
    """The traces of one panel; only the first panel's are named in the legend."""
    value = f"%{{x:{panel.adaptation.format}}} learned, %{{y:{panel.kind.format}}}"
    made = []
    for trace in panel.traces:
        group = {"legendgroup": trace.arm, "name": trace.arm}
        for xs, ys in trace.fronts:
            made.append(go.Scatter(x=xs, y=ys, mode="lines", line={"color": trace.colour, "width": 1}, opacity=0.35,
                                   hoverinfo="skip", showlegend=False, **group))  # fmt: skip
        for chosen in (False, True):
            dots = [dot for dot in trace.dots if dot.chosen is chosen]
            symbol = PLOTLY_MARKS[trace.number % len(PLOTLY_MARKS)] + ("" if chosen else "-open")
            told = "on the front" if chosen else "not on the front"
            made.append(go.Scatter(
                x=[dot.x for dot in dots], y=[dot.y for dot in dots], text=[dot.label for dot in dots], mode="markers",
                marker={"symbol": symbol, "size": 6, "color": trace.colour}, opacity=0.6, showlegend=False,
                hovertemplate=f"<b>%{{fullData.name}}</b><br>{value}<br>%{{text}}<br>{told}<extra></extra>", **group,
            ))  # fmt: skip
        made.append(go.Scatter(
            x=trace.mean[0], y=trace.mean[1], mode="lines", line={"color": trace.colour, "width": 3.5},
            showlegend=first, hovertemplate=f"<b>%{{fullData.name}}</b>, mean<br>{value}<extra></extra>", **group,
        ))  # fmt: skip
    if panel.base:
        star = {"symbol": "star", "size": 15, "color": INK, "line": {"color": "white", "width": 1}}
        made.append(go.Scatter(x=panel.base[:1], y=panel.base[1:], mode="markers", marker=star, name=BASE_NAME,
                               legendgroup=BASE_NAME, showlegend=first,
                               hovertemplate=f"<b>{BASE_NAME}</b><br>{value}<extra></extra>"))  # fmt: skip
    return made
