"""The number of threads that a run computes with on the CPU.

At the end of each product the threads wait for the slowest one. Where products are tiny, or other programs keep the
cores busy, one thread is therefore often faster than all of them.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import nn

from minilora.adapters.dropout import set_dropout_step
from minilora.runs.batch import plan_steps
from minilora.runs.config import TrainConfig
from minilora.runs.objective import TokenLoss

MAX_PARAMETERS = 200_000_000  # the products of a larger model are worth all threads
MAX_TOKENS = 512  # of the rows that are timed
MAX_SECONDS = 2.0  # where a step takes longer than this, or the rounds together do, no further round follows
ROUNDS = 5


def choose_threads(model: nn.Module, dataset: Sequence[Any], config: TrainConfig) -> int | None:
    """Set the number of threads to one or to all, whichever runs a forward and backward pass of a few rows faster.

    Weights, gradients and random states stay as they are.

    Returns:
        The number of threads, or None where nothing is measured: with OMP_NUM_THREADS set, with one thread, on another
        device, or for a large model.

    Raises:
        DataError, TrainingError: the rows or the model cannot be trained, as in `train`.
    """
    threads, device = torch.get_num_threads(), next(model.parameters()).device
    is_small = sum(p.numel() for p in model.parameters()) <= MAX_PARAMETERS
    if "OMP_NUM_THREADS" in os.environ or threads == 1 or device.type != "cpu" or not is_small:
        return None
    objective, was_training = TokenLoss(config), model.training
    objective.check(model, dataset, ())
    batch = objective.batch(_few_rows(dataset, objective.lengths(dataset), config), device)

    def step() -> None:
        loss, _ = objective(model, batch)
        loss.backward()

    model.train()
    set_dropout_step(model, config.seed, 0)
    try:
        found = fastest_thread_count(step, (1, threads))
    finally:
        set_dropout_step(model, None)
        model.train(was_training)
        model.zero_grad()
    torch.set_num_threads(found)
    return found


def _few_rows(dataset: Sequence[Any], lengths: Sequence[int], config: TrainConfig) -> list[Any]:
    """The rows of the first micro-batch, shortest first, up to `MAX_TOKENS`; at least one."""
    chosen, total = list[Any](), 0
    for row in sorted(plan_steps(lengths, config)[0][0], key=lambda row: lengths[row]):
        total += lengths[row]
        if chosen and total > MAX_TOKENS:
            break
        chosen.append(dataset[row])
    return chosen


def fastest_thread_count(step: Callable[[], None], choices: Sequence[int]) -> int:
    """Return the number of threads with the smallest median time of a step; the last one where a step takes long."""

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        began = perf_counter()
        step()
        return perf_counter() - began

    first = seconds(choices[-1])  # not counted: it also prepares the kernels
    if first > MAX_SECONDS:
        return choices[-1]
    times: dict[int, list[float]] = {threads: [] for threads in choices}
    for _ in range(ROUNDS):
        for threads in choices:
            times[threads].append(seconds(threads))
        if sum(map(sum, times.values())) > MAX_SECONDS:
            break
    return min(choices, key=lambda threads: statistics.median(times[threads]))
