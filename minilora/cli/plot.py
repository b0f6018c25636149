"""Plot loss, evaluation loss, learning rate and gradient norm of runs.

Example:
  minilora plot run1 run2 --out runs.svg
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora.cli import Options
from minilora.durable import replacing
from minilora.errors import ConfigError, FormatError
from minilora.runs.reports import Curve, Metrics, read_metrics, smooth
from minilora.storage import read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
# Okabe & Ito 2008, Color Universal Design: colours that colour-blind readers can distinguish, without its yellow, which
# is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")  # for more runs than colours
CROWD = 3  # with more runs, only the smoothed lines are drawn
WIDTH = 104  # of the picture, in characters
FAINT = {"alpha": 0.3, "linewidth": 0.8}
EVALUATION = {"marker": "o", "markeredgecolor": "white", "markersize": 6, "linewidth": 1}
HELD_OUT = {"marker": "D", "markerfacecolor": "white", "markersize": 6, "linestyle": "none"}
# Text stays text: small, searchable, and in the reader's font. The salt makes the same names in every picture.
STYLE: dict[Any, Any] = {
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so widths are the same everywhere
    "svg.fonttype": "none",
    "svg.hashsalt": "minilora",
    "font.size": 9,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "#e4e4e4",
    "lines.linewidth": 1.6,
    "path.simplify_threshold": 1.0,  # pixels that a line of many points may deviate by
    "xtick.bottom": False,
    "ytick.left": False,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, which need not be finished")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="image file, .svg or .png (default: plot.svg, in the directory of the run if there is only one)",
    )


def run(options: Options) -> int:
    paths = {Path(run).resolve(): Path(run) for run in options["runs"]}  # each run once
    out = options["out"] or (paths.copy().popitem()[1] if len(paths) == 1 else Path()) / "plot.svg"
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out {out}: ends in {out.suffix!r}; need one of {', '.join(SUFFIXES)}")
    named = dict(zip(distinct_names(list(paths)), paths.values(), strict=True))
    runs = {name: read_metrics(path) for name, path in named.items()}
    held_out = {name: held_out_loss(path) for name, path in named.items()}
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plot needs the package matplotlib: pip install 'minilora[plot]'")
    save_picture(runs, out, held_out)
    print(f"plot written to {out}")
    return 0


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the last parts of different paths, as many of each as make them distinct.

    >>> distinct_names([Path("/a/run"), Path("/b/run")])
    ['a/run', 'b/run']
    """
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def held_out_loss(run: Path) -> Curve:
    """Return the held-out loss before and after training from a run's summary.json; no points if there is none.

    Raises:
        FormatError: summary.json has no steps, or no loss before and after.
    """
    path = run / "summary.json"
    if not path.is_file():
        return Curve((), ())
    summary = read_json(path)
    try:
        losses = {0: summary["before"]["loss"], int(summary["steps"]): summary["after"]["loss"]}
        known = {step: float(loss) for step, loss in losses.items() if loss is not None}  # null if nothing is held out
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: need 'steps', and 'before' and 'after' with a 'loss'") from error
    return Curve(tuple(known), tuple(known.values()))


def save_picture(runs: Mapping[str, Metrics], path: Path, held_out: Mapping[str, Curve] | None = None) -> None:
    """Write an .svg or .png; the same runs give the same bytes, whatever matplotlib's settings are."""
    import matplotlib

    with matplotlib.rc_context(), replacing(path) as temporary:
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
        draw(runs, held_out).savefig(temporary, format=path.suffix[1:], dpi=150, metadata=metadata)


def draw(runs: Mapping[str, Metrics], held_out: Mapping[str, Curve] | None = None) -> Figure:
    """Draw loss and evaluation above, learning rate and gradient norm below; `held_out` is the loss before and after.

    The keys of both are the names of the runs.
    """
    from matplotlib.figure import Figure

    figure, held_out = Figure(figsize=(8, 6), layout="constrained"), held_out or {}
    figure.suptitle(f"Fine-tuning: {', '.join(runs) if len(runs) == 1 else f'{len(runs)} runs'}", parse_math=False)
    loss, rate, norm = figure.subplot_mosaic([["loss", "loss"], ["rate", "norm"]], height_ratios=(3, 2)).values()
    looks = ({"linestyle": dash, "color": colour} for dash in cycle(DASHES) for colour in COLOURS)
    styles = dict(zip(runs, looks, strict=False))
    for name, run in runs.items():
        style = styles[name]
        _draw_curve(rate, run.learning_rate, **style)
        for axes, curve in ((loss, run.loss), (norm, run.grad_norm)):
            if smooth(curve) != curve and len(runs) <= CROWD:
                _draw_curve(axes, curve, **style, **FAINT)
            _draw_curve(axes, smooth(curve), **style)
        _draw_curve(loss, run.eval_loss, **style, **EVALUATION)
        _draw_curve(loss, held_out.get(name, Curve((), ())), **{**style, **HELD_OUT})
    losses = [curve for run in runs.values() for curve in (smooth(run.loss), run.eval_loss)]
    _label(loss, [*losses, *held_out.values()], "loss (nats per token)")
    _label(rate, [], "learning rate")
    _label(norm, [smooth(run.grad_norm) for run in runs.values()], "gradient norm")
    _add_legend(figure, styles, _kinds(runs, held_out))
    return figure


def needs_logarithm(curves: Sequence[Curve]) -> bool:
    """Return whether the curves span more than a decade, all above 0; a linear axis would flatten most of them."""
    values = [value for curve in curves for value in curve.values]
    return bool(values) and 0 < 10 * min(values) < max(values)


def _draw_curve(axes: Axes, curve: Curve, **style: Any) -> None:
    dot = {"marker": "."} if len(curve) == 1 else {}  # a line through one point is invisible
    if len(curve):
        axes.plot(curve.steps, curve.values, **{**dot, **style})


def _label(axes: Axes, curves: Sequence[Curve], name: str) -> None:
    """Name both axes, and make the vertical one logarithmic if the curves need it."""
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


def _kinds(runs: Mapping[str, Metrics], held_out: Mapping[str, Curve]) -> dict[str, Mapping[str, Any]]:
    """Return the kinds of lines in the panel of the loss, by what the legend calls them, with their styles."""
    is_smoothed = any(smooth(run.loss) != run.loss for run in runs.values())
    kinds: dict[str, tuple[dict[str, Any], bool]] = {
        "each step": (FAINT, is_smoothed and len(runs) <= CROWD),
        "training, smoothed" if is_smoothed else "training": ({}, any(len(run.loss) for run in runs.values())),
        "evaluation": (EVALUATION, any(len(run.eval_loss) for run in runs.values())),
        "held-out loss before and after": (HELD_OUT, any(map(len, held_out.values()))),
    }
    return {name: style for name, (style, is_drawn) in kinds.items() if is_drawn}


def _add_legend(figure: Figure, runs: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Add a legend of the kinds of lines, in the colour of a single run; of many, the runs first, the kinds in grey."""
    from matplotlib.lines import Line2D

    shared = {"color": "#666666"} if len(runs) > 1 else next(iter(runs.values()))
    entries = [*runs.items()] if len(runs) > 1 else []
    entries += [(name, {**shared, **style}) for name, style in kinds.items()]
    lengths = [len(name) + 9 for name, _ in entries]  # with the line before it
    columns = len(entries) if sum(lengths) <= WIDTH else max(1, WIDTH // max(lengths))
    handles = [Line2D([], [], **{"linewidth": 1.6, **style}) for _, style in entries]
    legend = figure.legend(handles, "." * len(entries), loc="outside lower center", ncols=columns, frameon=False)
    for text, (name, _) in zip(legend.get_texts(), entries, strict=True):
        text.set(text=name, parse_math=False)  # only now: matplotlib hides a label that begins with an underscore
