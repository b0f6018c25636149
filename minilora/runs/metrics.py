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
from minilora.storage import read_text


@dataclass(frozen=True)
class Curve:
    """What one key of the metrics said at which steps."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Metrics:
    """The curves of one run; those of the first line have a point a step, `eval_loss` one an evaluation."""

    loss: Curve
    learning_rate: Curve
    grad_norm: Curve
    eval_loss: Curve


def read_metrics(run: Path) -> Metrics:
    """The curves of a run's directory.

    Raises:
        FormatError: the directory has no metrics.jsonl, or it holds no step, or a line that is none of a run's.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise FormatError(f"{path}: no such file; the directory of a run has one")
    records = read_records(path)
    if not records:
        raise FormatError(f"{path}: holds no step yet")
    return Metrics(**{key: _curve(records, key) for key in Metrics.__dataclass_fields__})


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects in a metrics.jsonl. A last line that was cut off by a crash is left out.

    Raises:
        FormatError: there is no such file, or a line is none of a run's.
    """
    lines = read_text(path).splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def smooth(curve: Curve) -> Curve:
    """The mean over a window around each point, a twentieth of the curve; one of fewer than 40 points stays as it is.

    At its beginning, where a loss falls steeply, the window narrows to the point itself; at its end it loses the half
    that lies beyond.

    >>> smooth(Curve(tuple(range(40)), (8.0, 2.0, 5.0) + (5.0,) * 37)).values[:4]
    (8.0, 5.0, 4.0, 5.0)
    """
    half = len(curve) // 40
    windows = (curve.values[i - min(i, half) : i + min(i, half) + 1] for i in range(len(curve)))
    return Curve(curve.steps, tuple(math.fsum(window) / len(window) for window in windows))


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise FormatError(f"{where}: need an object with a whole number as 'step'")
    return record


def _curve(records: Sequence[dict[str, Any]], key: str) -> Curve:
    """Values that are not finite cannot be drawn, and are left out."""
    points = [(r["step"], r[key]) for r in records if _is_number(r.get(key)) and math.isfinite(r[key])]
    return Curve(tuple(step for step, _ in points), tuple(value for _, value in points))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


SCALARS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "train/tokens_per_second",
    "eval_loss": "eval/loss",
}


class TensorBoard:
    """Writes each record of a run into a directory for `tensorboard --logdir`, at once, so that a crash loses none.

    Args:
        directory: where the event files go; those of earlier starts of the run stay in it.
        step: the step that the run goes on from. What an earlier start wrote of later steps is no longer shown.

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
        """Scalars as in `SCALARS`; {"prompt", "text"} objects under "samples" as text, one page for each."""
        step = record["step"]
        for key, tag in SCALARS.items():
            if key in record:
                self.writer.add_scalar(tag, record[key], step)
        for i, sample in enumerate(record.get("samples", ()), start=1):
            self.writer.add_text(f"samples/{i}", _page(sample), step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def _page(sample: dict[str, str]) -> str:
    """Markdown that shows prompt and text as they are: in an indented block nothing is markup."""
    parts = (f"{name}:\n\n{textwrap.indent(sample[name], '    ', lambda line: True)}" for name in ("prompt", "text"))
    return "\n\n".join(parts)
