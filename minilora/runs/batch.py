"""Which rows are in which batch.

The whole order of a run is a function of the seed and the rows' lengths, so a resumed run needs a step number and
nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from minilora.errors import ConfigError
from minilora.runs.config import TrainConfig

Rows = list[int]  # indices of the rows of one micro-batch
MOST_STEPS = 1_000_000
EPOCH_SEEDS = 1_000_003  # apart enough that no two (seed, epoch) of sensible size meet


def plan_steps(lengths: Sequence[int], config: TrainConfig) -> list[list[Rows]]:
    """The micro-batches of every step of a run.

    Each epoch is a fresh permutation of all rows, cut into micro-batches; `gradient_accumulation_steps` of them make a
    step, fewer at an epoch's end. A fraction of an epoch is a fraction of its steps. With `sort_window`, so many rows
    of the permutation at a time are sorted by length before it is cut, and the micro-batches come in another order.

    Raises:
        ConfigError: there are more steps than a plan can hold.
    """
    steps: list[list[Rows]] = []
    epochs = math.inf if config.max_steps is not None else config.epochs
    for epoch in range(math.ceil(config.epochs) if config.max_steps is None else config.max_steps):
        micro_batches = _micro_batches(lengths, config, epoch)
        k = config.gradient_accumulation_steps
        whole = [micro_batches[i : i + k] for i in range(0, len(micro_batches), k)]
        if (config.max_steps or config.epochs * len(whole)) > MOST_STEPS:
            raise ConfigError(
                f"max_steps {config.max_steps}, epochs {config.epochs}: need at most {MOST_STEPS:,} steps"
            )
        share = round(min(1.0, epochs - epoch) * len(whole), 9)  # 1.1 - 1 is a little more than 0.1
        steps += whole[: math.ceil(share)]
        if config.max_steps is not None and len(steps) >= config.max_steps:
            return steps[: config.max_steps]
    return steps


def groups(lengths: Sequence[int], rows: Sequence[int], limit: int) -> Iterator[Rows]:
    """Consecutive rows of at most `limit` tokens together; a longer row makes a group of its own."""
    group: Rows = []
    size = 0
    for row in rows:
        if group and size + lengths[row] > limit:
            yield group
            group, size = [], 0
        group.append(row)
        size += lengths[row]
    if group:
        yield group


def _micro_batches(lengths: Sequence[int], config: TrainConfig, epoch: int) -> list[Rows]:
    """Those of one epoch."""
    generator = torch.Generator().manual_seed(config.seed * EPOCH_SEEDS + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = config.sort_window
    if size > 1:
        windows = (order[i : i + size] for i in range(0, len(order), size))
        order = [row for window in windows for row in sorted(window, key=lengths.__getitem__)]
    if config.batch_tokens is not None:
        micro_batches = list(groups(lengths, order, config.batch_tokens))
    else:
        micro_batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    if size == 1:
        return micro_batches
    return [micro_batches[i] for i in torch.randperm(len(micro_batches), generator=generator).tolist()]
