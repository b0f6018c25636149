"""Other layers that are a linear map W (out, in) in some form, with adapters.

transformers' Conv1D   x W,        W stored as (in, out)
an embedding           one row of  Wᵀ, (num, dim), for each index: x is that index's one-hot vector
a convolution          W stored as (out, in/groups, *kernel); in here is channels times kernel

N  rows of x    G  groups of a convolution's channels
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.adapters.find import shallow_copy
from minilora.errors import ConfigError
from minilora.lora import AdapterLinear, LoraAdapter, Shape

CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class AdapterConv1D(AdapterLinear):
    """transformers' Conv1D, which is a linear layer with W stored as (in, out) (final)."""

    @staticmethod
    def shapes(base: Any, r: int) -> tuple[Shape, Shape]:
        inner, out = base.weight.shape
        return (r, inner), (out, r)

    def base_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.base.weight.T, bias)

    def lora_forward(self, x: Tensor, bias: Tensor | None, adapter: LoraAdapter) -> Tensor:
        return self.base_forward(x, bias) + self.lora_update(x, adapter)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def merged(self) -> nn.Module:
        return shallow_copy(self.base, {"weight": self.merged_weight(), "bias": self.merged_bias()})


class AdapterEmbedding(AdapterLinear):
    """An embedding: column i of W (dim, num) for the index i, and column i of A (final).

    With dropout an index goes without adapter as a whole, as the one number of its one-hot vector is dropped.
    """

    PEFT_NAMES: ClassVar[Mapping[str, str]] = {
        "lora_A": "lora_embedding_A",
        "lora_B": "lora_embedding_B",
        "magnitude": "lora_magnitude_vector",
    }

    @staticmethod
    def shapes(base: Any, r: int) -> tuple[Shape, Shape]:
        return (r, base.num_embeddings), (base.embedding_dim, r)

    def base_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.base(x)

    def lora_forward(self, x: Tensor, bias: Tensor | None, adapter: LoraAdapter) -> Tensor:
        return self.base(x) + self.lora_update(x, adapter)

    def lora_update(self, x: Tensor, adapter: LoraAdapter) -> Tensor:
        lora_A, lora_B = adapter.factors()
        h = F.embedding(x, lora_A.T, self.base.padding_idx)
        h = adapter.scale * h * adapter.dropout(torch.ones_like(h[..., :1]))
        return F.linear(h, lora_B).to(self.base.weight.dtype)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def merged(self) -> nn.Module:
        return shallow_copy(self.base, {"weight": self.merged_weight()})


class AdapterConv(AdapterLinear):
    """A convolution in one, two or three dimensions (final).

    A is a convolution with the base's kernel, stride, padding and dilation and r channels, B one with a kernel of one.
    With groups A sees all channels and B only those of its group, as in PEFT; the sum then is no grouped convolution,
    so that merging leaves one without groups.

    Shapes: A (r, in, *kernel), B (out, r/G, 1, …)
    """

    @staticmethod
    def shapes(base: Any, r: int) -> tuple[Shape, Shape]:
        """See `AdapterLinear`.

        Raises:
            ConfigError: the groups do not divide r.
        """
        if r % base.groups:
            raise ConfigError(f"a convolution of {base.groups} groups needs a rank that they divide, found r {r}")
        ones = (1,) * len(base.kernel_size)
        return (r, base.in_channels, *base.kernel_size), (base.out_channels, r // base.groups, *ones)

    def base_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._convolve(x, self.base.weight, bias, self.base.groups)

    def lora_forward(self, x: Tensor, bias: Tensor | None, adapter: LoraAdapter) -> Tensor:
        return self.base_forward(x, bias) + self.lora_update(x, adapter)

    def lora_update(self, x: Tensor, adapter: LoraAdapter) -> Tensor:
        lora_A, lora_B = adapter.factors()
        h = adapter.scale * self._convolve(adapter.dropout(x), lora_A.to(x.dtype), None, 1)
        return CONVOLUTIONS[type(self.base)](h, lora_B.to(x.dtype), groups=self.base.groups)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        base = self.base
        padding: Any = base.padding
        if base.padding_mode != "zeros":
            x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
        return CONVOLUTIONS[type(base)](x, weight, bias, base.stride, padding, base.dilation, groups)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return ungrouped(weight, self.base.groups).flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.view(len(matrix), -1, *self.base.kernel_size)

    def as_matrices(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """See `AdapterLinear`. In G groups each row of B has its r/G numbers only."""
        return lora_A.flatten(1), ungrouped(lora_B, self.base.groups).flatten(1)

    def broadcast_to_output(self, values: Tensor) -> Tensor:
        return values.view(-1, *(1,) * len(self.base.kernel_size))

    def merged(self) -> nn.Module:
        merged: Any = shallow_copy(self.base, {"weight": self.merged_weight(), "bias": self.merged_bias()})
        merged.groups = 1
        return merged


def ungrouped(weight: Tensor, groups: int) -> Tensor:
    """Return the weight of the same convolution without groups, (out, in/G, …) -> (out, in, …), by adding zeros."""
    if groups == 1:
        return weight
    out, inner, *kernel = weight.shape
    whole = weight.new_zeros(groups, out // groups, groups, inner, *kernel)
    for group, block in enumerate(weight.unflatten(0, (groups, -1))):
        whole[group, :, group] = block
    return whole.flatten(2, 3).flatten(0, 1)
