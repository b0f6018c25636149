"""Dropout whose masks follow from a seed, the step, the layer and the adapter, as `train` draws them.

[Dropout] Srivastava et al. 2014, Dropout: A Simple Way to Prevent Neural Networks from Overfitting
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapter import adapter_layers
from minilora.errors import check_types
from minilora.lora import LoraAdapter


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
