"""The page of `--dry-run`: the first rows with what is learned of them, and figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from minilora.adapters.find import ParameterCount
from minilora.data import IGNORE_INDEX, Example
from minilora.models.tokenizer import Tokenizer
from minilora.runs.config import TrainConfig
from minilora.runs.dataset import Dataset
from minilora.runs.inputs import Data
from minilora.runs.memory import Forecast, amount
from minilora.runs.meter import visible
from minilora.runs.seeded import plan_steps

ROWS = 3
MARKS = {True: ("\x1b[32m", "\x1b[0m"), False: ("⟦", "⟧")}  # around what is learned: on a terminal, elsewhere


def preview(data: Data, config: TrainConfig, count: ParameterCount) -> str:
    """Return what `--dry-run` prints about the rows and the steps."""
    is_terminal = sys.stdout.isatty()
    begin, end = MARKS[is_terminal]
    shown = data.train[:ROWS]
    rows = [f"the first {len(shown)} of {len(data.train):,} training rows; {begin}so marked{end} is learned"]
    for example in shown:
        rows.append(f"\n--- {example.source}\n{marked(example, data.tokenizer, begin, end, data.labels)}")
    steps = plan_steps(data.train.lengths, config)
    rows_seen, tokens, labels = len(steps.rows), steps.tokens.sum(), data.train.labelled[steps.rows].sum()
    at_most = "at most " if config.early_stopping else ""
    truncated, unlabelled = data.train.truncated, data.train.unlabelled
    totals = [
        f"cut to --max-length: {truncated:,} training rows, which lost {data.train.lost:,} labels",
        f"not used: {unlabelled:,} training rows that had no label left",
        f"the run: {at_most}{len(steps):,} steps, {rows_seen:,} rows, {tokens:,} tokens, {labels:,} of them learned",
        f"parameters: {count.trainable:,} of {count.total:,} are trained ({count.trainable / count.total:.2%})",
    ]
    table = [f"{'tokens of a row':<18}{'rows':>8}{'shortest':>10}{'median':>8}{'95 %':>8}{'longest':>9}{'labels':>10}"]
    table += [_lengths(name, examples) for name, examples in data.splits.items()]
    return "\n".join([*rows, "", *table, "", *totals])


def marked(example: Example, tokenizer: Tokenizer, begin: str, end: str, classes: Sequence[str] = ()) -> str:
    """Return the text of an example, control tokens included, with marks around learned tokens, or their `classes`.

    A stretch is what it adds to the decoded text: decoded alone, it could lose the space that it begins with.
    """

    def stretch_of(place: int) -> int:
        """Return 0 for tokens that are not learned, 1 for learned ones, and a number of its own for each class."""
        return (example.labels[place] != IGNORE_INDEX) * (place + 1 if classes else 1)

    text, done = "", ""
    for is_learned, places in groupby(range(len(example.tokens)), stretch_of):
        last = max(places)
        so_far = tokenizer.decode(example.tokens[: last + 1], skip_special_tokens=False)
        label = f" = {classes[example.labels[last]]}" if is_learned and classes else ""
        stretch = visible(so_far[len(done) :] + label)
        text += f"{begin}{stretch}{end}" if is_learned else stretch
        done = so_far
    return text


def _lengths(name: str, examples: Dataset) -> str:
    lengths = np.sort(examples.lengths)
    most = lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]
    return (
        f"{name:<18}{len(lengths):>8,}{lengths[0]:>10,}{np.median(lengths):>8,.0f}{most:>8,}{lengths[-1]:>9,}"
        f"{examples.labelled.sum():>10,}"
    )


def memory_lines(found: Forecast, held: int, free: int | None) -> str:
    """Return what `--dry-run` prints about memory: each term of the forecast, and what is free."""
    parts = ", ".join(f"{term} {amount(size)}" for term, size in vars(found).items())
    free_text = "unknown" if free is None else amount(free)
    besides = f", besides {amount(held)} that the process holds already" if held else ""
    return f"memory: {parts}\n  at most {amount(found.peak)} at once{besides}; {free_text} free"
