"""How many threads a run computes with on the CPU.

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

from minilora.lora.attach import forget_dropout_step, set_dropout_step
from minilora.train.batch import plan_steps
from minilora.train.config import TrainConfig
from minilora.train.objective import TokenLoss

MAX_PARAMETERS = 200_000_000  # a larger model has products that are worth all threads
ROUNDS, SECONDS = 5, 2.0  # the most of each that a measurement takes, where one round is enough


def threads_are_given() -> bool:
    """Is the number of threads the user's, by OMP_NUM_THREADS, or is there only one?"""
    return "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() == 1


def choose_threads(model: nn.Module, dataset: Sequence[Any], config: TrainConfig) -> int | None:
    """Compute with one thread or with all, whichever is faster for the forward and backward pass of the first rows.

    The weights stay as they are, and no gradient is left.

    Returns:
        The number of threads, which is set; None where there is nothing to measure: on another device, for a large
        model, or where `threads_are_given`.
    """
    device = next(model.parameters()).device
    if device.type != "cpu" or threads_are_given() or sum(p.numel() for p in model.parameters()) > MAX_PARAMETERS:
        return None
    objective, was_training = TokenLoss(config), model.training
    rows = plan_steps(objective.lengths(dataset), config)[0][0]
    batch = objective.batch([dataset[row] for row in rows], device)

    def step() -> None:
        loss, _ = objective(model, batch)
        loss.backward()

    model.train()
    set_dropout_step(model, config.seed, 0)
    try:
        found = fastest(step, (1, torch.get_num_threads()))
    finally:
        forget_dropout_step(model)
        model.train(was_training)
        model.zero_grad()
    torch.set_num_threads(found)
    return found


def fastest(step: Callable[[], None], choices: Sequence[int]) -> int:
    """Return the number of threads with the smallest median time of a step; each has its turn in every round."""
    step()  # the first one also prepares kernels
    seconds: dict[int, list[float]] = {threads: [] for threads in choices}
    began, rounds = perf_counter(), 0
    while rounds == 0 or (rounds < ROUNDS and perf_counter() - began < SECONDS):
        for threads in choices:
            torch.set_num_threads(threads)
            before = perf_counter()
            step()
            seconds[threads].append(perf_counter() - before)
        rounds += 1
    return min(choices, key=lambda threads: statistics.median(seconds[threads]))
