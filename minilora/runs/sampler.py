"""What a run draws from its seed: the order of rows, and the masks of dropout.

Both are functions of only the seed and the step, so a resumed run needs no saved random state.

    [Dropout]  Srivastava et al. 2014, Dropout: A Simple Way to Prevent Neural Networks from Overfitting
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minilora.adapter import adapter_layers
from minilora.errors import ConfigError
from minilora.lora import LoraAdapter
from minilora.runs.settings import TrainConfig

RowIndices = list[int]  # indices of the rows of one micro-batch
StepRows = list[RowIndices]  # those of each micro-batch
MAX_STEPS = 1_000_000
EVAL_TOKENS = 4096  # of a forward pass of an evaluation
SEEDS = 1_000_003  # larger than the number of epochs, so those of nearby seeds differ; the generator keeps 32 bits


class MicroBatch(NamedTuple):
    number: int  # step · gradient_accumulation_steps + its place in the step; seeds its dropout
    rows: Any  # as the loss takes them
    is_counted: bool  # or else another rank has it as well


def plan_steps(rows: int, config: TrainConfig) -> list[StepRows]:
    """Return the micro-batches of every step of a run with so many rows.

    Each epoch is a new permutation of all rows, cut into micro-batches; `gradient_accumulation_steps` of them make a
    step, fewer at an epoch's end. A fraction of an epoch is a fraction of its steps; a run has at least one.
    """
    accumulated = config.gradient_accumulation_steps
    steps, max_steps = list[StepRows](), config.max_steps
    epochs = config.epochs if max_steps is None else max_steps  # an epoch has at least one step
    for epoch in range(math.ceil(epochs)):
        generator = torch.Generator().manual_seed(config.seed * SEEDS + epoch)
        order = torch.randperm(rows, generator=generator).tolist()
        micro_batches = [order[i : i + config.batch_size] for i in range(0, rows, config.batch_size)]
        whole = math.ceil(len(micro_batches) / accumulated)
        if (max_steps or epochs * whole) > MAX_STEPS:
            raise ConfigError(f"max_steps {max_steps}, epochs {config.epochs}: need at most {MAX_STEPS:,} steps")
        share = round(min(1.0, epochs - epoch) * whole, 9)  # 1.1 - 1 is a little more than 0.1
        count = max(1 - len(steps), math.ceil(share)) if max_steps is None else min(whole, max_steps - len(steps))
        steps += [micro_batches[i : i + accumulated] for i in range(0, count * accumulated, accumulated)]
        if len(steps) == max_steps:
            break
    return steps


def eval_groups(sizes: Iterable[int], most: int | None = None) -> Iterator[RowIndices]:
    """Yield the indices of the rows of each forward pass: consecutive rows whose sizes are at most `most`, or one row.

    The size of a row is its number of tokens, and `most` is `EVAL_TOKENS`, unless the caller counts something else.
    """
    group, total = RowIndices(), 0
    limit = EVAL_TOKENS if most is None else most
    for i, size in enumerate(sizes):
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(i)
        total += size
    if group:
        yield group


class SeededDropout(nn.Dropout):
    """x ↦ x ∘ mask/(1-p),  mask ~ Bernoulli(1-p)  [Dropout §4], where the mask follows from the seed.

    No global random state is read or changed, so recomputing a layer or resuming a run draws the same mask.
    """

    seed: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        generator = None if x.is_meta else torch.Generator(x.device).manual_seed(self.seed)
        mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - self.p, generator=generator)
        return x * mask / (1 - self.p)


def hash_seed(key: str) -> int:
    """Return 56 bits of a hash of the key, of which PyTorch's generator on a CPU keeps the lower 32."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "little")


def adapters_with_dropout(model: nn.Module) -> dict[str, LoraAdapter]:
    """Return the adapters that have dropout, by the paths of their layers and their names."""
    layers = adapter_layers(model).values()
    adapters = {f"{layer.path}/{name}": adapter for layer in layers for name, adapter in layer.adapters.items()}
    return {key: each for key, each in adapters.items() if isinstance(each, LoraAdapter) and each.dropout.p}


def seed_dropout(adapters: Mapping[str, LoraAdapter], seed: int | None, step: int = 0) -> None:
    """Let `adapters_with_dropout` draw the masks of a step of a run.

    The mask of a layer follows from the seed, the step, the layer and the adapter. So a layer that is called several
    times in a step, as the shared layers of ALBERT are, has the same mask each time. With the seed None adapters draw
    from PyTorch's random state, as after `attach`.
    """
    for key, adapter in adapters.items():
        dropout: Any = adapter.dropout
        if isinstance(dropout, SeededDropout) != (seed is not None):
            dropout = (nn.Dropout if seed is None else SeededDropout)(dropout.p).train(adapter.training)
        if seed is not None:
            dropout.seed = hash_seed(f"{seed}/{step}/{key}")
        adapter.dropout = dropout


@contextmanager
def kept_random_state(device: torch.device, key: str | None = None) -> Iterator[None]:
    """Leave PyTorch's random state as it was before the block, in which it follows from the key, if one is given."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        if key is not None:
            seed_random_state(device, key)
        yield


def seed_random_state(device: torch.device, key: str) -> None:
    """Set PyTorch's random state from a hash of the key, on the CPU and on the device.

    So the dropout of another library's model, and what a loss samples, are the same in a resumed run.
    """
    seed = hash_seed(key)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        state = torch.Generator(device).manual_seed(seed).get_state()
        torch.get_device_module(device).set_rng_state(state, device)
