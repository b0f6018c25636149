"""Read metrics.jsonl as curves, and write records for TensorBoard.

{"step": 20, "loss": 0.545, "learning_rate": 0.0016, "grad_norm": 2.80, …}      one for a step
{"step": 20, "eval_loss": 0.488, …}                                             one for an evaluation
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.errors import ConfigError, FormatError
from minilora.limits import RECORDS_BYTES
from minilora.storage import read_text


@dataclass(frozen=True)
class Curve:
    """A curve: the values of one key of the metrics, and their steps."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Metrics:
    """A run's curves, with a point for each step; `eval_loss` with one for each evaluation."""

    loss: Curve
    learning_rate: Curve
    grad_norm: Curve
    eval_loss: Curve


def read_metrics(run: Path) -> Metrics:
    """Read the curves of a run's directory.

    Raises:
        FormatError: there is no metrics.jsonl, or it holds no step, or a line that is no record of a run.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise FormatError(f"{path}: no such file; the directory of a run has one")
    records = read_records(path)
    if not records:
        raise FormatError(f"{path}: holds no step yet")
    return Metrics(**{key: _curve(records, key) for key in Metrics.__dataclass_fields__})


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the objects in a metrics.jsonl. A last line that was cut off by a crash is left out.

    Raises:
        FormatError: there is no such file, or a line is no record of a run.
    """
    lines, records = read_text(path, RECORDS_BYTES).splitlines(keepends=True), []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise FormatError(f"{path}, line {number}: need an object with a whole number as 'step'")
        records.append(record)
    return records


def smooth(curve: Curve) -> Curve:
    """Compute the mean over a window around each point, a twentieth of the curve; below 40 points it changes nothing.

    At the beginning, where a loss falls steeply, the window narrows to the point itself; at the end it is cut off.

    >>> smooth(Curve(tuple(range(40)), (8.0, 2.0, 5.0) + (5.0,) * 37)).values[:4]
    (8.0, 5.0, 4.0, 5.0)
    """
    half = len(curve) // 40
    windows = (curve.values[i - min(i, half) : i + min(i, half) + 1] for i in range(len(curve)))
    return Curve(curve.steps, tuple(math.fsum(window) / len(window) for window in windows))


def _curve(records: Sequence[dict[str, Any]], key: str) -> Curve:
    """Return the values of a key that can be drawn: finite numbers."""
    points = [(r["step"], r[key]) for r in records if type(r.get(key)) in (int, float) and math.isfinite(r[key])]
    return Curve(tuple(step for step, _ in points), tuple(value for _, value in points))


SCALARS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "train/tokens_per_second",
    "eval_loss": "eval/loss",
}


class TensorBoard:
    """Write each record of a run into a directory for `tensorboard --logdir`, at once, so that a crash loses none.

    Args:
        directory: of the event files; those of earlier starts of the run stay in it.
        step: from which the run is resumed. What an earlier start wrote of later steps is no longer shown.

    Raises:
        ConfigError: the package tensorboard is not installed.
    """

    def __init__(self, directory: Path, step: int = 0):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            need = "--report tensorboard needs the package tensorboard: pip install 'minilora[tensorboard]'"
            raise ConfigError(f"{need} ({error})") from error
        self.writer = SummaryWriter(str(directory), purge_step=step + 1)

    def __call__(self, record: dict[str, Any]) -> None:
        """Write a record's numbers as scalars, and each {"prompt", "text"} of its "samples" as a text."""
        step = record["step"]
        for key, tag in SCALARS.items():
            if record.get(key) is not None:  # as in a step that was skipped
                self.writer.add_scalar(tag, record[key], step)
        for i, sample in enumerate(record.get("samples", ()), start=1):
            # an indented block, in which nothing is markup
            parts = (
                f"{name}:\n\n{textwrap.indent(sample[name], '    ', lambda line: True)}" for name in ("prompt", "text")
            )
            self.writer.add_text(f"samples/{i}", "\n\n".join(parts), step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
