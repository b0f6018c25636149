"""What a run would learn: the first rows with their labels, and the steps."""

import sys
from itertools import groupby
from statistics import median

from minilora.adapters.attach import ParameterCount
from minilora.data import IGNORE_INDEX, Example
from minilora.errors import printable
from minilora.models.tokenizer import Tokenizer
from minilora.runs.encoders import Dataset
from minilora.runs.inputs import Data
from minilora.runs.sampler import plan_steps
from minilora.runs.settings import TrainConfig

ROWS = 3
MARKS = {True: ("\x1b[32m", "\x1b[0m"), False: ("⟦", "⟧")}  # around what is learned: on a terminal, elsewhere


def preview(data: Data, config: TrainConfig, count: ParameterCount) -> str:
    """Return what `--dry-run` prints about the rows and the steps."""
    is_terminal = sys.stdout.isatty()
    begin, end = MARKS[is_terminal]
    shown = data.train[:ROWS]
    rows = [f"{len(shown)} of the {len(data.train):,} training rows; {begin}so marked{end} is learned"]
    for example in shown:
        rows.append(f"\n--- {example.source}\n{mark_learned(example, data.tokenizer, begin, end)}")
    steps = plan_steps(len(data.train), config)
    seen = [data.train[row] for step in steps for batch in step for row in batch]
    tokens, labels = sum(len(example.tokens) for example in seen), sum(example.labelled for example in seen)
    at_most = "at most " if config.early_stopping else ""
    totals = [
        f"the run: {at_most}{len(steps):,} steps, {len(seen):,} rows, {tokens:,} tokens, {labels:,} of them learned",
        f"parameters: {count.trainable:,} of {count.total:,} are trained ({count.trainable / count.total:.2%})",
    ]
    table = [f"{'tokens of a row':<18}{'rows':>8}{'shortest':>10}{'median':>8}{'95 %':>8}{'longest':>9}{'labels':>10}"]
    table += [_lengths(name, examples) for name, examples in data.splits.items()]
    return "\n".join([*rows, "", *table, "", *totals])


def mark_learned(example: Example, tokenizer: Tokenizer, begin: str, end: str) -> str:
    """Return the text of an example, control tokens included, with marks around learned tokens.

    A stretch is what it adds to the decoded text: decoded by itself, it could lose the space that it begins with.
    """
    text, done, count = "", "", 0
    for is_learned, labels in groupby(example.labels, lambda label: label != IGNORE_INDEX):
        count += len(list(labels))
        so_far = tokenizer.decode(example.tokens[:count], skip_special_tokens=False)
        stretch = printable(so_far[len(done) :])
        text += f"{begin}{stretch}{end}" if is_learned else stretch
        done = so_far
    return text


def _lengths(name: str, examples: Dataset) -> str:
    lengths = sorted(len(example.tokens) for example in examples)
    most = lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]
    return (
        f"{name:<18}{len(lengths):>8,}{lengths[0]:>10,}{median(lengths):>8,.0f}{most:>8,}{lengths[-1]:>9,}"
        f"{sum(example.labelled for example in examples):>10,}"
    )
