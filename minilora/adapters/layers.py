"""Wrappers of other layers that apply a linear map W (out, in).

    transformers' Conv1D   W is stored as (in, out)
    embedding              a row of Wᵀ (num, dim) for each index, whose one-hot vector is x
    convolution            W is stored as (out, in/groups, *kernel); in is channels times kernel

G  groups of a convolution's channels
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


class _OtherLayer(AdapterLinear):
    """A wrapper whose base is no linear, so that `lora_linear` does not apply (abstract)."""

    def lora_forward(self, x: Tensor, bias: Tensor | None, adapter: LoraAdapter) -> Tensor:
        return self.base_forward(x, bias) + self.lora_update(x, adapter)


class AdapterConv1D(_OtherLayer):
    """transformers' Conv1D, a linear layer with W stored as (in, out) (final)."""

    @staticmethod
    def shapes(base: Any, r: int) -> tuple[Shape, Shape]:
        inner, out = base.weight.shape
        return (r, inner), (out, r)

    def base_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.base.weight.T, bias)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def merged(self) -> nn.Module:
        return shallow_copy(self.base, {"weight": self.merged_weight(), "bias": self.merged_bias()})


class AdapterEmbedding(_OtherLayer):
    """An embedding: index i selects column i of W (dim, num) and column i of A (final).

    Dropout drops the adapter of an index as a whole, because its one-hot vector has only one number.
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


class AdapterConv(_OtherLayer):
    """A convolution in one, two or three dimensions (final).

    A is a convolution to r channels with the base's kernel, stride, padding and dilation; B has a kernel of size 1.
    With groups, A sees all channels and B only those of its group, as in PEFT. Their product is not a grouped
    convolution, so a merged layer has no groups.

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
