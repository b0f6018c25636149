"""Other layers that are a matrix W (out, in) in some form, with adapters.

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

from minilora.adapters.adapted import Shape, twin
from minilora.adapters.functional import lora_branch, lora_linear
from minilora.adapters.layers import AdapterLayer, AdapterLinear, Drop, LowRank
from minilora.errors import ConfigError

CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class AdapterConv1D(AdapterLayer):
    """transformers' Conv1D, which is a linear with W stored as (in, out) (final)."""

    IS_TURNED = True
    KEYS = AdapterLinear.KEYS

    @staticmethod
    def shapes(base: Any, r: int) -> tuple[Shape, Shape]:
        inner, out = base.weight.shape
        return (r, inner), (out, r)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.T, bias)

    def branch(self, x: Tensor, adapter: LowRank, drop: Drop) -> Tensor:
        return lora_branch(drop(x), *adapter.arguments())

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None, adapter: LowRank) -> Tensor:
        return lora_linear(x, weight.T, bias, *adapter.arguments())

    def plain(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return twin(self.base, {"weight": weight, "bias": bias})


class AdapterEmbedding(AdapterLayer):
    """An embedding: column i of W (dim, num) for the index i, so A's column i, too (final).

    With dropout an index goes without adapter as a whole, as the one number of its one-hot vector is dropped.
    """

    base: nn.Embedding
    IS_TURNED = True
    KEYS: ClassVar[Mapping[str, str]] = {
        "lora_A": "lora_embedding_A",
        "lora_B": "lora_embedding_B",
        "magnitude": "lora_magnitude_vector",
    }

    @staticmethod
    def shapes(base: Any, r: int) -> tuple[Shape, Shape]:
        return (r, base.num_embeddings), (base.embedding_dim, r)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.base(x)

    def branch(self, x: Tensor, adapter: LowRank, drop: Drop) -> Tensor:
        lora_A, lora_B = adapter.factors()
        h = F.embedding(x, lora_A.T, self.base.padding_idx)
        h = adapter.scale * h * drop(torch.ones_like(h[..., :1]))
        return F.linear(h, lora_B).to(self.base.weight.dtype)

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None, adapter: LowRank) -> Tensor:
        return self.project(x, weight, bias) + self.branch(x, adapter, lambda ones: ones)

    def plain(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return twin(self.base, {"weight": weight})


class AdapterConv(AdapterLayer):
    """A convolution in one, two or three dimensions (final).

    A is a convolution with the base's kernel, stride, padding and dilation and r channels, B one with a kernel of one.
    With groups A sees all channels and B only those of its group, as in PEFT; the sum then is no grouped convolution,
    so that merging leaves one without groups.

    Shapes: A (r, in, *kernel), B (out, r/G, 1, …)
    """

    base: Conv
    IS_TURNED = False
    KEYS = AdapterLinear.KEYS

    @staticmethod
    def shapes(base: Any, r: int) -> tuple[Shape, Shape]:
        """See `AdapterLayer`.

        Raises:
            ConfigError: the groups do not divide r.
        """
        if r % base.groups:
            raise ConfigError(f"a convolution of {base.groups} groups needs a rank that they divide, found r {r}")
        ones = (1,) * len(base.kernel_size)
        return (r, base.in_channels, *base.kernel_size), (base.out_channels, r // base.groups, *ones)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._convolve(x, weight, bias, self.base.groups)

    def branch(self, x: Tensor, adapter: LowRank, drop: Drop) -> Tensor:
        lora_A, lora_B = adapter.factors()
        h = adapter.scale * self._convolve(drop(x), lora_A.to(x.dtype), None, 1)
        return CONVOLUTIONS[type(self.base)](h, lora_B.to(x.dtype), groups=self.base.groups)

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None, adapter: LowRank) -> Tensor:
        return self.project(x, weight, bias) + self.branch(x, adapter, lambda x: x)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        base = self.base
        padding: Any = base.padding
        if base.padding_mode != "zeros":
            x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
        return CONVOLUTIONS[type(base)](x, weight, bias, base.stride, padding, base.dilation, groups)

    def plain(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        merged: Any = twin(self.base, {"weight": weight, "bias": bias})
        merged.groups = 1
        return merged
