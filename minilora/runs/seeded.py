"""What a run draws from its seed: the order of rows, and the masks of dropout.

Both are functions of the seed and the step, and of no random state, so a resumed run needs a step number and nothing
else.

    [Dropout]  Srivastava et al. 2014, Dropout: A Simple Way to Prevent Neural Networks from Overfitting
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapter import adapter_layers
from minilora.errors import ConfigError, check_types
from minilora.lora import LoraAdapter
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


class SeededDropout(nn.Module):
    """x ↦ x ∘ mask/(1-p),  mask ~ Bernoulli(1-p)  [Dropout §4], where the mask follows from the seed.

    No global random state is read or moved, so recomputing a layer or resuming a run draws the same mask.
    """

    seed: Tensor  # an input, and no constant, of what is compiled

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x * _mask(x.detach(), self.p, self.seed) / (1 - self.p) if self.training else x


@torch.library.custom_op("minilora::dropout_mask", mutates_args=(), schema="(Tensor x, float p, Tensor seed) -> Tensor")
def _mask(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Draw which numbers of x stay. An operator of its own, because torch.compile cannot look into a generator."""
    generator = torch.Generator(x.device).manual_seed(int(seed))
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p, generator=generator)


@_mask.register_fake
def _(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.bool)


def dropout_seed(key: str) -> Tensor:
    """Return a number of 56 bits that follows from the key."""
    digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
    return torch.tensor(int.from_bytes(digest, "little"))


def set_dropout_step(model: nn.Module, seed: int | None, step: int = 0) -> None:
    """Let adapters draw the dropout masks of a step of a run; `train` does it before each forward pass.

    With the seed None they draw from PyTorch's random state again, as after `attach`.
    """
    check_types(set_dropout_step, locals())
    for layer in adapter_layers(model).values():
        for name, adapter in layer.adapters.items():
            if isinstance(adapter, LoraAdapter) and (p := adapter.dropout.p):
                dropout: Any = adapter.dropout
                if isinstance(dropout, SeededDropout) != (seed is not None):
                    dropout = (nn.Dropout if seed is None else SeededDropout)(p).train(adapter.training)
                dropout.seed = dropout_seed(f"{seed}/{step}/{layer.path}/{name}")
                adapter.dropout = dropout
