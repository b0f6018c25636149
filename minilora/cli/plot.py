"""Plot the loss, or another metric, of one or several runs.

Example:
  minilora plot run1 run2 --out runs.svg
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minilora.cli import Options, Parser
from minilora.errors import ConfigError, FormatError
from minilora.files import replacing
from minilora.runs.reports import read_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png", ".pdf")
WINDOW = 20  # the smoothed line is the mean of a twentieth of the steps


def add_flags(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, finished or not")
    parser.add_argument("--metric", default="loss", help="loss, or a metric that your own loss returns (default: loss)")
    parser.add_argument("--out", type=Path, default=Path("plot.svg"), help="an .svg, .png or .pdf (default: plot.svg)")


def run(options: Options) -> int:
    out = options["out"]
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out {out}: ends in {out.suffix!r}; need one of {', '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise ConfigError("plot needs the package matplotlib: pip install matplotlib")
    figure = draw({run: read_records(Path(run) / "metrics.jsonl") for run in options["runs"]}, options["metric"])
    with replacing(out) as temporary:
        figure.savefig(temporary, format=out.suffix[1:], dpi=150)
    print(f"plot written to {out}")
    return 0


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]], metric: str = "loss") -> "Figure":
    """Draw a metric of each step, its moving average, and the evaluations; `runs` are records by the run's name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel="loss (nats per token)" if metric == "loss" else metric)
    for i, (name, records) in enumerate(runs.items()):
        colour, label = f"C{i % 10}", name.replace("$", r"\$")  # two $ would enclose mathematics
        (steps, losses), evaluations = points(records, metric), points(records, f"eval_{metric}")
        if not losses:
            known = sorted({key for record in records for key in record} - {"step", "total_steps"})
            raise FormatError(f"{name}: holds no step with {metric} yet; it has {', '.join(known) or 'no metric'}")
        width = max(1, len(losses) // WINDOW)
        means = np.convolve(losses, np.full(width, 1 / width), "valid")
        axes.plot(steps, losses, color=colour, alpha=0.3, linewidth=0.8)
        kind = "evaluation" if metric.startswith("eval_") else "training"
        axes.plot(steps[width // 2 :][: len(means)], means, color=colour, label=f"{kind}, {label}")
        if evaluations[0]:
            axes.plot(*evaluations, "o--", color=colour, label=f"evaluation, {label}")
    axes.legend(frameon=False)
    return figure


def points(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return the steps and the values of the records that have a number at a key."""
    pairs = [(record["step"], record[key]) for record in records if isinstance(record.get(key), int | float)]
    return [step for step, _ in pairs], [value for _, value in pairs]
