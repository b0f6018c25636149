"""Runs as a small chart of text: the smoothed loss in braille dots, two by four in a character, and its evaluations.

Runs stand below each other on the same axes, so they can be compared without colours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from minilora.metrics import Curve, Metrics, needs_logarithm, smooth

ROWS = 9  # characters; odd, so that one is the middle
MARGIN = 9  # characters: a number and the axis
EVALUATION = "o"
BRAILLE = 0x2800  # the character without dots
BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a dot by its row and column
ASCII = str.maketrans({"┤": "|", "│": "|", "└": "+", "─": "-"} | {chr(BRAILLE + i): "*" for i in range(1, 256)})


@dataclass(frozen=True)
class Frame:
    """The axes: steps and values at the edges, and the width in characters."""

    first: int
    last: int
    low: float
    high: float
    is_logarithmic: bool
    width: int

    def dots(self, curve: Curve) -> tuple[list[float], list[float]]:
        """Columns from the left and rows from the top, in dots."""
        scale = math.log if self.is_logarithmic else float
        low, high = scale(self.low), scale(self.high)
        columns = [(2 * self.width - 1) * _share(step, self.first, self.last) for step in curve.steps]
        return columns, [(4 * ROWS - 1) * _share(scale(value), high, low) for value in curve.values]

    def ticks(self) -> dict[int, str]:
        """Row -> what stands beside it."""
        middle = math.sqrt(self.low * self.high) if self.is_logarithmic else (self.low + self.high) / 2
        return {0: f"{self.high:.3g}", ROWS // 2: f"{middle:.3g}", ROWS - 1: f"{self.low:.3g}"}


def chart(runs: Mapping[str, Metrics], width: int, encoding: str = "utf-8") -> str:
    """Lines of at most `width` characters, from 40 on; in ASCII where the encoding has no braille."""
    curves = [curve for run in runs.values() for curve in (smooth(run.loss), run.eval_loss)]
    steps = [step for curve in curves for step in curve.steps]
    values = [value for curve in curves for value in curve.values]
    if not values:
        return "there is no loss to draw yet"
    is_logarithmic = needs_logarithm(curves)
    frame = Frame(min(steps), max(steps), min(values), max(values), is_logarithmic, max(40, width) - MARGIN)
    smoothed = any(smooth(run.loss) != run.loss for run in runs.values())
    unit = f"loss in nats per token{', log scale' * is_logarithmic}"
    legend = f"{unit}   ⠤⠤ training{', smoothed' * smoothed}   {EVALUATION} evaluation"
    text = "\n".join([*(_panel(name, run, frame) for name, run in runs.items()), f"{legend:.{max(40, width)}}"])
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(ASCII).encode(encoding, "replace").decode(encoding)
    return text


def _panel(name: str, run: Metrics, frame: Frame) -> str:
    last = {"loss": smooth(run.loss), "evaluation": run.eval_loss}
    told = ", ".join(f"{key} {curve.values[-1]:.4g}" for key, curve in last.items() if len(curve))
    title = f"{name}: {told or 'no loss yet'}"
    ticks = frame.ticks()
    rows = [
        f"{ticks.get(i, ''):>{MARGIN - 1}}{'┤' if i in ticks else '│'}{row}" for i, row in enumerate(_rows(run, frame))
    ]
    axis = " " * (MARGIN - 1) + "└" + "─" * frame.width
    last_step = f"step {frame.last}"
    steps = " " * MARGIN + f"{frame.first:<{frame.width - len(last_step)}}{last_step}"
    return "\n".join([title[: frame.width + MARGIN], *(row.rstrip() for row in rows), axis, steps])


def _rows(run: Metrics, frame: Frame) -> list[str]:
    """The inside of the axes."""
    cells = [[" "] * frame.width for _ in range(ROWS)]
    for row, column in np.argwhere(_line(smooth(run.loss), frame)):
        cell = cells[row // 4][column // 2]
        dots = BRAILLE if cell == " " else ord(cell)
        cells[row // 4][column // 2] = chr(dots | BITS[row % 4][column % 2])
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
