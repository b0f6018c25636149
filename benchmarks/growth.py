"""Time and memory of a step while one size grows: measured, fitted by what the arithmetic says, and drawn.

Time should be a + b · FLOP, and memory a + b · size. Adapters that are loaded but do not act have no FLOP.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import turns
from benchmarks import work as works
from benchmarks.process import Round
from benchmarks.work import Growth, Task, Training

LENGTH = 1024
STEPS = 4  # the first is a warm-up
OFF = 0.15  # how far a point may be off the fit


def measure(growth: Growth, shop: turns.Workshop) -> Round:
    """A step at each point, in a fresh process; what FLOP there were is kept with it."""
    found = {}
    for point in growth.points:
        task, rank = at(growth, point, shop), point if growth.size == "rank" else works.RANK
        measured = turns.measured(task, works.OURS)
        flop = works.training_flops(works.config_of(task.model), task.batches[0], rank)
        found[f"{point}"] = replace(measured, checks={"flop": flop})
    return Round(growth.name, found)


def at(growth: Growth, point: int, shop: turns.Workshop) -> Task:
    """The task where the size is `point`: a document at a step."""
    sizes = {"tokens": LENGTH, "rank": works.RANK, "adapters": 1, growth.size: point}
    model = shop.layers(point) if growth.size == "layers" else "smollm2"
    adapter = shop.adapter(model, rank=sizes["rank"])
    vocabulary = works.config_of(shop.model(model))["vocab_size"]
    tokens = works.prompts([sizes["tokens"]] * STEPS, vocabulary)
    rows = [(each, each) for each in tokens]
    work = Training(growth.name, "bfloat16", "long")
    return Task(work, shop.model(model), adapter, shop.device, rows, [[row] for row in rows], 1, sizes["adapters"])


@dataclass(frozen=True)
class Curve:
    """Points of one quantity, and the fit a + b · expected.

    Shapes: all (n)
    """

    sizes: np.ndarray
    found: np.ndarray
    fitted: np.ndarray

    @property
    def off(self) -> np.ndarray:
        """How far each point is from the fit, as a share of it."""
        return np.abs(self.found / self.fitted - 1)

    def sentence(self, what: str, expected: str) -> str:
        """Does it grow as it should?"""
        worst = int(self.off.argmax())
        grows = "grows" if self.off[worst] <= OFF else "does **not** grow"
        largest = f"{self.off[worst]:.0%}, at {self.sizes[worst]}"
        return f"{what} {grows} as the arithmetic says: a + b · {expected} is off by at most {largest}"


def curve(sizes: Sequence[int], found: Sequence[float], expected: Sequence[float]) -> Curve:
    """The fit of least squares of relative errors, so that small sizes count as much as large ones."""
    y, e = np.array(found, dtype=float), np.array(expected, dtype=float)
    terms = np.stack([np.ones_like(e), e / e.max()], axis=1)
    weights, *_ = np.linalg.lstsq(terms / y[:, None], np.ones_like(y), rcond=None)
    return Curve(np.array(sizes), y, terms @ weights)


def curves(each: Round) -> tuple[Curve, Curve]:
    """Time and memory of the points of a round."""
    sizes = [int(point) for point in each.sides]
    points = list(each.sides.values())
    seconds = [statistics.median(point.seconds) for point in points]
    time = curve(sizes, seconds, [point.checks["flop"] for point in points])
    return time, curve(sizes, [point.peak_bytes / 1e9 for point in points], sizes)


def sentences(growth: Growth, each: Round) -> str:
    """What is to be seen in the picture."""
    time, memory = curves(each)
    return f"{time.sentence('Time', 'FLOP')}. {memory.sentence('Memory', growth.size)}."


def draw(growth: Growth, each: Round, path: Path) -> None:
    """An SVG of both curves: points that were measured, and the fit."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": growth.name}):
        figure = Figure(figsize=(8, 3), layout="constrained")
        for axes, what, found in zip(figure.subplots(1, 2), ("seconds a step", "peak, GB"), curves(each), strict=True):
            axes.plot(found.sizes, found.found, "o", label="measured")
            axes.plot(found.sizes, found.fitted, "-", label="a + b · arithmetic")
            axes.set(xscale="log", xlabel=growth.size, ylabel=what, ylim=(0, None))
            axes.set_xticks(found.sizes, [f"{size}" for size in found.sizes])
            axes.minorticks_off()
            axes.legend()
        figure.savefig(path, format="svg", metadata={"Date": None})
