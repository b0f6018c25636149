"""Runs as a small chart of text: the smoothed loss in braille dots, two by four in a character, and its evaluations.

Runs stand below each other on the same axes, so they can be compared without colours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from minilora.metrics import Curve, Metrics, smooth

ROWS = 9  # characters; odd, so that one is the middle
MARGIN = 9  # characters: a number and the axis
EVALUATION = "o"
BRAILLE = 0x2800  # the character without dots
BITS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # of a dot by its row and column


@dataclass(frozen=True)
class Frame:
    """The axes: steps and values at the edges, and the width in characters."""

    first: int
    last: int
    low: float
    high: float
    width: int

    def dots(self, curve: Curve) -> tuple[list[float], list[float]]:
        """Columns from the left and rows from the top, in dots."""
        columns = [(2 * self.width - 1) * _share(step, self.first, self.last) for step in curve.steps]
        return columns, [(4 * ROWS - 1) * _share(value, self.high, self.low) for value in curve.values]


def chart(runs: Mapping[str, Metrics], width: int, encoding: str = "utf-8") -> str:
    """Lines of at most `width` characters, from 40 on; dots are question marks where the encoding has no braille."""
    curves = [curve for run in runs.values() for curve in (smooth(run.loss), run.eval_loss)]
    steps = [step for curve in curves for step in curve.steps]
    values = [value for curve in curves for value in curve.values]
    if not values:
        return "there is no loss to draw yet"
    frame = Frame(min(steps), max(steps), min(values), max(values), max(40, width) - MARGIN)
    smoothed = any(smooth(run.loss) != run.loss for run in runs.values())
    legend = f"loss in nats per token   ⠤⠤ training{', smoothed' * smoothed}   {EVALUATION} evaluation"
    text = "\n".join([*(_panel(name, run, frame) for name, run in runs.items()), f"{legend:.{max(40, width)}}"])
    return text.encode(encoding, "replace").decode(encoding)


def _panel(name: str, run: Metrics, frame: Frame) -> str:
    last = {"loss": smooth(run.loss), "evaluation": run.eval_loss}
    told = ", ".join(f"{key} {curve.values[-1]:.4g}" for key, curve in last.items() if len(curve))
    title = f"{name}: {told or 'no loss yet'}"
    ticks = {0: frame.high, ROWS // 2: (frame.low + frame.high) / 2, ROWS - 1: frame.low}
    labels = [f"{ticks[i]:>{MARGIN - 1}.3g}┤" if i in ticks else "│".rjust(MARGIN) for i in range(ROWS)]
    rows = [(label + row).rstrip() for label, row in zip(labels, _rows(run, frame), strict=True)]
    axis = " " * (MARGIN - 1) + "└" + "─" * frame.width
    last_step = f"step {frame.last}"
    steps = " " * MARGIN + f"{frame.first:<{frame.width - len(last_step)}}{last_step}"
    return "\n".join([title[: frame.width + MARGIN], *rows, axis, steps])


def _rows(run: Metrics, frame: Frame) -> list[str]:
    """The inside of the axes."""
    dots = _line(smooth(run.loss), frame).reshape(ROWS, 4, frame.width, 2)
    bits = (dots * BITS[:, None]).sum((1, 3))
    cells = [[chr(BRAILLE + cell) if cell else " " for cell in row] for row in bits]
    for x, y in zip(*frame.dots(run.eval_loss), strict=True):
        cells[round(y) // 4][round(x) // 2] = EVALUATION
    return ["".join(row) for row in cells]


def _line(curve: Curve, frame: Frame) -> np.ndarray:
    """Which dots a line through all points covers: at each point and column, all between its height and the last."""
    dots = np.zeros((4 * ROWS, 2 * frame.width), dtype=bool)
    if len(curve):
        xs, ys = frame.dots(curve)
        places = np.union1d(xs, np.arange(math.ceil(xs[0]), xs[-1]))
        heights = np.interp(places, xs, ys).round().astype(int)
        for place, (before, here) in zip(places, pairwise([heights[0], *heights]), strict=True):
            dots[min(before, here) : max(before, here) + 1, round(place)] = True
    return dots


def _share(value: float, start: float, end: float) -> float:
    """Where a value lies between two others, 0 to 1; in the middle if there is nothing between."""
    return (value - start) / (end - start) if start != end else 0.5
