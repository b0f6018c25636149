"""What a run draws from its seed: the order of rows, and the masks of dropout.

Both are functions of the seed and the step alone, so a resumed run needs no saved random state.

    [Dropout]  Srivastava et al. 2014, Dropout: A Simple Way to Prevent Neural Networks from Overfitting
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minilora.adapter import adapter_layers
from minilora.errors import ConfigError, check_types
from minilora.lora import LoraAdapter
from minilora.runs.config import TrainConfig

Rows = list[int]  # indices of the rows of one micro-batch
MICRO_BATCH_SEEDS = 1_000_003  # larger than the number of micro-batches, so that no two share a random state
MAX_STEPS = 1_000_000
EPOCH_SEEDS = 1_000_003  # larger than the number of epochs, so that no two pairs (seed, epoch) share a generator


class Batch(NamedTuple):
    """A micro-batch."""

    number: int  # in the run
    rows: Any  # as the loss takes them
    counts: bool  # or else another rank has it, too


def plan_steps(lengths: Sequence[int], config: TrainConfig) -> list[list[Rows]]:
    """Return the micro-batches of every step of a run.

    Each epoch is a new permutation of all rows, cut into micro-batches; `gradient_accumulation_steps` of them make a
    step, fewer at an epoch's end. A fraction of an epoch is a fraction of its steps. With `sort_window`, that many rows
    of the permutation at a time are sorted by length before it is cut, and the micro-batches are shuffled.

    Raises:
        ConfigError: there are more than `MAX_STEPS` steps.
    """
    steps: list[list[Rows]] = []
    max_steps = config.max_steps
    epochs = config.epochs if max_steps is None else max_steps  # an epoch has at least one step
    for epoch in range(math.ceil(epochs)):
        micro_batches = _micro_batches(lengths, config, epoch)
        whole = _chunks(micro_batches, config.gradient_accumulation_steps)
        if (max_steps or epochs * len(whole)) > MAX_STEPS:
            raise ConfigError(f"max_steps {max_steps}, epochs {config.epochs}: need at most {MAX_STEPS:,} steps")
        share = round(min(1.0, epochs - epoch) * len(whole), 9)  # 1.1 - 1 is a little more than 0.1
        steps += whole[: math.ceil(share)]
        if max_steps is not None and len(steps) >= max_steps:
            break
    return steps[:max_steps]


def _micro_batches(lengths: Sequence[int], config: TrainConfig, epoch: int) -> list[Rows]:
    generator = torch.Generator().manual_seed(config.seed * EPOCH_SEEDS + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    if config.sort_window > 1:
        windows = _chunks(order, config.sort_window)
        order = [row for window in windows for row in sorted(window, key=lengths.__getitem__)]
    if config.batch_tokens is None:
        found = _chunks(order, config.batch_size)
    else:
        found = list(groups(lengths, order, config.batch_tokens))
    if config.sort_window == 1:
        return found
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


def _chunks(values: list[Any], size: int) -> list[list[Any]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def groups(lengths: Sequence[int], rows: Sequence[int], limit: int) -> Iterator[Rows]:
    """Yield consecutive rows of at most `limit` tokens together; a longer row makes a group of its own."""
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


class SeededDropout(nn.Module):
    """x ↦ x ∘ mask/(1-p),  mask ~ Bernoulli(1-p)  [Dropout §4], where the mask follows from the seed.

    No global random state is read or changed, so recomputing a layer or resuming a run draws the same mask.
    """

    seed: Tensor  # a tensor, so that a compiled layer takes it as an input

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x * _mask(x.detach(), self.p, self.seed) / (1 - self.p) if self.training else x


@torch.library.custom_op("minilora::dropout_mask", mutates_args=(), schema="(Tensor x, float p, Tensor seed) -> Tensor")
def _mask(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Draw which numbers of x stay. A custom operator, because torch.compile cannot trace a generator."""
    generator = torch.Generator(x.device).manual_seed(int(seed))
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p, generator=generator)


@_mask.register_fake
def _(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.bool)


def dropout_seed(key: str) -> Tensor:
    """Return 56 bits of a hash of the key."""
    digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
    return torch.tensor(int.from_bytes(digest, "little"))


def set_dropout_step(model: nn.Module, seed: int | None, step: int = 0) -> None:
    """Let adapters draw the dropout masks of a step of a run; `train` calls it before each forward pass.

    With the seed None they draw from PyTorch's random state, as after `attach`.
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


def seeded(model: nn.Module, batches: Sequence[Batch], seed: int) -> Iterator[Batch]:
    """Yield the micro-batches, each with PyTorch's random state set from the seed, on the CPU and on CUDA.

    So the dropout of another library's model is the same in a resumed run. The state is restored afterwards.
    """
    device = next(model.parameters()).device
    for batch in batches:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            number = seed * MICRO_BATCH_SEEDS + batch.number
            torch.default_generator.manual_seed(number)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(number)
            set_dropout_step(model, seed, batch.number)
            yield batch
