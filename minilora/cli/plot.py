"""Plot loss, evaluation loss, learning rate and gradient norm of runs.

Example:
  minilora plot run1 run2 --out runs.svg
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from minilora.cli import Options
from minilora.errors import ConfigError
from minilora.runs.metrics import read_metrics
from minilora.tools.plot import SUFFIXES, held_out_loss, save_picture


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
