"""Runs as a picture, drawn by matplotlib (extra `plot`).

[Okabe-Ito]  Okabe & Ito 2008, Color Universal Design: colours that colour-blind readers tell apart
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora.runs.metrics import Curve, Metrics, smooth
from minilora.storage import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
# [Okabe-Ito] without its yellow, which white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")  # for more runs than colours
CROWD = 3  # runs; of more only the smoothed lines are drawn
WIDTH = 104  # of the picture, in characters
FAINT = {"alpha": 0.3, "linewidth": 0.8}
EVALUATION = {"marker": "o", "markeredgecolor": "white", "markersize": 6, "linewidth": 1}
# Text stays text: small, found by a search, and of the reader's font. The salt makes the same names in every picture.
STYLE: dict[Any, Any] = {
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib's own, so everywhere of one width
    "svg.fonttype": "none",
    "svg.hashsalt": "minilora",
    "font.size": 9,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "#e4e4e4",
    "lines.linewidth": 1.6,
    "path.simplify_threshold": 1.0,  # pixels by which a line of many points may be off
    "xtick.bottom": False,
    "ytick.left": False,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


def save_picture(runs: Mapping[str, Metrics], path: Path) -> None:
    """Write an .svg or .png; the same runs give the same bytes, whatever matplotlib was told elsewhere."""
    import matplotlib

    with matplotlib.rc_context(), replacing(path) as temporary:
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
        draw(runs).savefig(temporary, format=path.suffix[1:], dpi=150, metadata=metadata)


def draw(runs: Mapping[str, Metrics]) -> Figure:
    """Loss and evaluation above; learning rate and gradient norm below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    loss, rate, norm = figure.subplot_mosaic([["loss", "loss"], ["rate", "norm"]], height_ratios=(3, 2)).values()
    styles = list(
        islice(({"linestyle": dash, "color": colour} for dash in cycle(DASHES) for colour in COLOURS), len(runs))
    )
    for run, style in zip(runs.values(), styles, strict=True):
        _draw_curve(rate, run.learning_rate, **style)
        for axes, curve in ((loss, run.loss), (norm, run.grad_norm)):
            if smooth(curve) != curve and len(runs) <= CROWD:
                _draw_curve(axes, curve, **style, **FAINT)
            _draw_curve(axes, smooth(curve), **style)
        _draw_curve(loss, run.eval_loss, **style, **EVALUATION)
    _label(
        loss, [curve for run in runs.values() for curve in (smooth(run.loss), run.eval_loss)], "loss (nats per token)"
    )
    _label(rate, [], "learning rate")
    _label(norm, [smooth(run.grad_norm) for run in runs.values()], "gradient norm")
    _add_legend(figure, runs, styles)
    return figure


def needs_logarithm(curves: Sequence[Curve]) -> bool:
    """Do the curves span more than a decade, all above 0? Drawn plainly, most of them would lie flat at the bottom."""
    values = [value for curve in curves for value in curve.values]
    return bool(values) and 0 < 10 * min(values) < max(values)


def _draw_curve(axes: Axes, curve: Curve, **style: Any) -> None:
    dot = {"marker": "."} if len(curve) == 1 else {}  # of which a line shows nothing
    axes.plot(curve.steps, curve.values, **{**dot, **style})


def _label(axes: Axes, curves: Sequence[Curve], name: str) -> None:
    """Names of both axes; a logarithmic one if the curves need it, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
    axes.set_ylabel(name)
    if needs_logarithm(curves):
        axes.set_yscale("log")
        axes.set_ylabel(f"{name}, log scale")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=True)


def _add_legend(figure: Figure, runs: Mapping[str, Metrics], styles: Sequence[Mapping[str, Any]]) -> None:
    """The runs by colour, then in grey what each kind of line is."""
    from matplotlib.lines import Line2D

    kinds: dict[str, Mapping[str, Any]] = {"training": {}}
    if any(smooth(run.loss) != run.loss for run in runs.values()):
        kinds = {"each step": FAINT} if len(runs) <= CROWD else {}
        kinds["training, smoothed"] = {}
    if any(len(run.eval_loss) for run in runs.values()):
        kinds["evaluation"] = EVALUATION
    entries = [*zip(runs, styles, strict=True), *((name, {"color": "#666666", **kind}) for name, kind in kinds.items())]
    lengths = [len(name) + 9 for name, _ in entries]  # with the line before it
    columns = len(entries) if sum(lengths) <= WIDTH else max(1, WIDTH // max(lengths))
    handles = [Line2D([], [], **{"linewidth": 1.6, **style}) for _, style in entries]
    legend = figure.legend(handles, "." * len(entries), loc="outside upper left", ncols=columns, frameon=False)
    for text, (name, _) in zip(legend.get_texts(), entries, strict=True):
        text.set(text=name, parse_math=False)  # only now: a label is hidden if it begins with an underscore
