"""A frozen layer with adapters.

`AdapterLayer` holds a base layer, which is never changed, and adapters by name. A base is a matrix W (out, in) in some
form; what an adapter makes of W is `LoRA` or `DoRA`. Forward is the merged weight applied, without ever forming it:

    for each active adapter in turn    LoRA: y ← y + s·B A x      DoRA: y ← k ⊙ (y + s·B A x),  k = m / ‖W + s·B A‖

beginning with y = W x, which a linear makes along with the first s·B A x, and ending with the bias. Start values that
move a part of W into A and B (PiSSA and its like) leave W where it is: with the start B₀ A₀, the adapter is
s·(B A - B₀ A₀), nothing at first, and W is never rounded.

    N  rows of x    in, out  features of the base    r  rank of an adapter

    [LoRA]  Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models
    [DoRA]  Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.adapters.adapted import Adapted, MixedBatch, Shape
from minilora.adapters.config import LoraConfig
from minilora.adapters.functional import (
    dora_norm,
    dora_stretch,
    lora_branch,
    lora_delta,
    lora_linear,
    lora_scale,
    seeded_dropout,
)
from minilora.quant.linear import Linear, NF4Linear, apply_weight, dense_linear, dense_weight, passing_weight, stored

Drop = Callable[[Tensor], Tensor]


class LowRank(nn.Module, ABC):
    """One adapter of one layer (abstract).

    Args:
        scale: s.
        tensors: `lora_A` and `lora_B`, and perhaps `lora_bias`, a bias of B; `bias`, which takes the place of the
            base's; `magnitude`, DoRA's m; `start_A` and `start_B`, whose product is subtracted.

    `cast` is set while `train` keeps copies of A and B of all layers in the dtype of the computation. Without it, A and
    B are cast where they are used.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_bias: nn.Parameter | None
    bias: nn.Parameter | None
    magnitude: nn.Parameter | None
    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(self, scale: float, tensors: Mapping[str, Tensor]):
        super().__init__()
        self.scale = scale
        self.cast: tuple[Tensor, Tensor] | None = None  # A and B in the dtype of the computation, if that is at hand
        for name in ("lora_A", "lora_B", "lora_bias", "bias", "magnitude"):
            self.register_parameter(name, nn.Parameter(tensors[name]) if name in tensors else None)
        for name in ("start_A", "start_B"):
            self.register_buffer(name, tensors.get(name))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B, or with a start [A; A₀] and [B, -B₀], whose product is B A - B₀ A₀."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return torch.cat((self.lora_A, self.start_A)), torch.cat((self.lora_B, -self.start_B), dim=1)

    def arguments(self) -> tuple[Tensor, Tensor, float, tuple[Tensor, Tensor] | None]:
        """A, B, s and `cast`, as `lora_linear` and `lora_branch` take them."""
        return *self.factors(), self.scale, self.cast if self.start_A is None else None

    def delta(self, dtype: torch.dtype) -> Tensor:
        """s·B A as a matrix (out, in), computed in the dtype."""
        lora_A, lora_B = (factor.to(dtype) for factor in AdapterLayer.thin(*self.factors()))
        return lora_delta(lora_A, lora_B, self.scale)

    @abstractmethod
    def finished(self, layer: AdapterLayer, y: Tensor, weight: Tensor) -> Tensor:
        """What becomes of y, to which s·B A x was added, in the course of `forward`."""

    @abstractmethod
    def merged(self, layer: AdapterLayer, matrix: Tensor, weight: Tensor) -> Tensor:
        """What becomes of the matrix (out, in), in the course of `merged_weight`, which begins with the weight."""


class LoRA(LowRank):
    """W ↦ W + s·B A  [LoRA eq. 3] (final)."""

    def finished(self, layer: AdapterLayer, y: Tensor, weight: Tensor) -> Tensor:
        return y

    def merged(self, layer: AdapterLayer, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix + self.delta(matrix.dtype)


class DoRA(LowRank):
    """W ↦ m ⊙ (W + s·B A) / ‖W + s·B A‖  [DoRA eq. 5], the norm a constant for the gradient [DoRA §4.3] (final).

    m begins as the norm, which makes it the identity. With other adapters before it, it stretches what they left, and
    the norm is still of W and its own A and B.
    """

    magnitude: nn.Parameter

    def stretch(self, layer: AdapterLayer, weight: Tensor) -> Tensor:
        """k = m / ‖W + s·B A‖, (out)."""
        return self.magnitude.flatten() / dora_norm(weight, *layer.thin(*self.factors()), self.scale)

    def finished(self, layer: AdapterLayer, y: Tensor, weight: Tensor) -> Tensor:
        return dora_stretch(y, layer.spread(self.stretch(layer, layer.matrix(weight))))

    def merged(self, layer: AdapterLayer, matrix: Tensor, weight: Tensor) -> Tensor:
        k = self.stretch(layer, weight).to(matrix.dtype)
        return k.unsqueeze(1) * (matrix + self.delta(matrix.dtype))


class AdapterLayer(Adapted):
    """A base with the matrix W (out, in) and low-rank adapters (abstract).

    Adapters are kept in their own dtype, float32 unless asked otherwise, and are cast to the dtype of x where they are
    used: the forward pass has no other cast.
    """

    KEYS: ClassVar[Mapping[str, str]]  # name of a tensor -> end of its name in PEFT's file
    IS_TURNED: ClassVar[bool]  # does the base hold Wᵀ?

    def add(self, name: str, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
        """Hold an adapter of A, B and what else `LowRank` takes; DoRA's m, if it is not given, is ‖W + s·B A‖."""
        scale = lora_scale(tensors["lora_A"].size(0), config.alpha(self.path), config.use_rslora)
        if config.use_dora and "magnitude" not in tensors:
            tensors = {**tensors, "magnitude": self._lengths(tensors, scale)}
        self.hold(name, config, (DoRA if config.use_dora else LoRA)(scale, tensors))

    def _lengths(self, tensors: Mapping[str, Tensor], scale: float) -> Tensor:
        """‖W + s·(B A - B₀ A₀)‖."""
        lora_A, lora_B = LoRA(scale, tensors).factors()
        shape = magnitude_shape(lora_B)
        weight = dense_weight(self.base).detach()
        if weight.is_meta:
            return torch.ones(shape, dtype=lora_A.dtype)
        lora_A, lora_B = lora_A.detach().to(weight.device), lora_B.detach().to(weight.device)
        return dora_norm(self.matrix(weight), *self.thin(lora_A, lora_B), scale).reshape(shape).to(lora_A.dtype)

    def current(self) -> nn.Module:
        return self.base

    def rivals(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.configs and self.adapters[name].bias is not None]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """See `Adapted`. A start is written as a part of A and B, whose rank it doubles."""
        adapter = self.adapters[name]
        found = dict(adapter.named_parameters()) | dict(zip(("lora_A", "lora_B"), adapter.factors(), strict=True))
        return {self.KEYS[key]: tensor for key, tensor in found.items()}

    def forward(self, x: Tensor) -> Tensor:
        """y = merged_weight() x + merged_bias()."""
        if self.mixed is not None:
            return self._mixed(x, self.mixed)
        if not self.active:
            return self.base(x)
        is_late = any(isinstance(self.adapters[name], DoRA) for name in self.active)  # the bias is not stretched
        bias, weight = self.merged_bias(self.active), passing_weight(self.base)
        y = self._changed(x, None, weight, None if is_late else bias, self.active)
        return y + self.spread(bias).to(y.dtype) if is_late and bias is not None else y

    def _mixed(self, x: Tensor, batch: MixedBatch) -> Tensor:
        """W is applied to all rows at once, and then to each group what its adapters do."""
        weight = passing_weight(self.base)
        y = self.project(x, weight, None)
        for names, rows in batch.groups(x):
            names = tuple(name for name in names if name in self.configs)
            part, bias = self._changed(x[rows], y[rows], weight, None, names), self.merged_bias(names)
            y[rows] = part if bias is None else part + self.spread(bias).to(y.dtype)
        return y

    def _changed(self, x: Tensor, y: Any, weight: Tensor, bias: Tensor | None, names: Sequence[str]) -> Tensor:
        """What the adapters make of y, one after the other; if that is None, of W x + b."""
        for name in names:
            adapter = self.adapters[name]
            if y is None and not self.drops(name):
                y = self.joined(x, weight, bias, adapter)
            else:
                y = self.project(x, weight, bias) if y is None else y
                x = x.to(y.dtype) if x.is_floating_point() else x
                y = y + self.branch(x, adapter, functools.partial(self.dropped, name=name))
            y = adapter.finished(self, y, weight)
        return y

    def drops(self, name: str) -> bool:
        """Does the adapter's branch see only a part of x?"""
        return self.training and self.configs[name].lora_dropout > 0

    def dropped(self, x: Tensor, name: str) -> Tensor:
        """Apply the adapter's dropout, in training.

        The mask follows from the seed that `set_dropout_step` has set, as `train` does before each micro-batch, or else
        from PyTorch's random state.
        """
        if not self.drops(name):
            return x
        p, seed = self.configs[name].lora_dropout, self.dropout_seeds.get(name)
        return F.dropout(x, p) if seed is None else seeded_dropout(x, p, seed)

    def merged_bias(self, names: Sequence[str] | None = None) -> Tensor | None:
        """b, or what an adapter trained in its place, and s·b_B of each B that has a bias: (out), or None."""
        adapters = [self.adapters[name] for name in (self.active if names is None else names)]
        bias = next((each.bias for each in adapters if each.bias is not None), getattr(self.base, "bias", None))
        for added in (each.scale * each.lora_bias for each in adapters if each.lora_bias is not None):
            bias = added if bias is None else bias + added
        return None if bias is None else bias.to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """That of the base, in which it computes."""
        return self.base.dtype if isinstance(self.base, NF4Linear) else self.base.weight.dtype

    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """What the active adapters make of the base's weight, or of the one that is given: in its shape and dtype.

        Computed in the widest of the dtypes and rounded once.
        """
        weight = dense_weight(self.base) if weight is None else weight
        if not self.active:
            return weight
        adapters = [self.adapters[name] for name in self.active]
        wide = functools.reduce(torch.promote_types, (each.lora_A.dtype for each in adapters), weight.dtype)
        matrix = start = self.matrix(weight).to(wide)
        for adapter in adapters:
            matrix = adapter.merged(self, matrix, start)
        shaped = matrix.T if self.IS_TURNED else matrix.view(len(matrix), -1, *weight.shape[2:])
        return shaped.to(weight.dtype)

    @property
    def weight(self) -> Tensor:
        """`merged_weight()`, for models that read a layer's weight."""
        return self.merged_weight()

    @property
    def bias(self) -> Tensor | None:
        """`merged_bias()`, likewise."""
        return self.merged_bias()

    def merged(self) -> nn.Module:
        """The plain layer of `merged_weight()` and `merged_bias()`."""
        return self.plain(self.merged_weight(), self.merged_bias())

    def matrix(self, weight: Tensor) -> Tensor:
        """The base's weight as W (out, in): zeros stand where a group of a convolution does not look."""
        if weight.dim() == 2:
            return weight.T if self.IS_TURNED else weight
        return ungrouped(weight, self.base.groups).flatten(1)

    def spread(self, values: Tensor) -> Tensor:
        """A number for each row of W, (out), in a shape that multiplies y: of a convolution (out, 1, …), as B is."""
        lora_B = next(iter(self.adapters.values())).lora_B
        return values.view(-1, *lora_B.shape[2:])

    @staticmethod
    def thin(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """A and B as matrices (r, in) and (out, r), as is W. In G groups each row of B has its r/G numbers only."""
        return lora_A.flatten(1), ungrouped(lora_B, lora_A.size(0) // lora_B.size(1)).flatten(1)

    @staticmethod
    @abstractmethod
    def shapes(base: Any, r: int) -> tuple[Shape, Shape]:
        """Of A and of B."""

    @abstractmethod
    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """W x + b, as the base computes it, with its weight as it is, or dense."""

    @abstractmethod
    def branch(self, x: Tensor, adapter: LowRank, drop: Drop) -> Tensor:
        """s·B A drop(x)."""

    @abstractmethod
    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None, adapter: LowRank) -> Tensor:
        """W x + b + s·B A x."""

    @abstractmethod
    def plain(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A layer like the base, with these numbers, frozen."""


class AdapterLinear(AdapterLayer):
    """x ↦ W x + b and what the adapters make of it, on a dense base or one in four bits (final).

    >>> layer = AdapterLinear(nn.Linear(8, 4), path="q_proj")
    >>> layer.add("default", LoraConfig(r=2, lora_alpha=6), {"lora_A": torch.ones(2, 8), "lora_B": torch.ones(4, 2)})
    >>> layer.active = ("default",)
    >>> (layer.merged_weight() - layer.base.weight)[0, :3].round()  # s·B A = 6/2 · (1·1 + 1·1)
    tensor([6., 6., 6.], grad_fn=<RoundBackward0>)
    """

    base: Linear
    IS_TURNED = False
    KEYS: ClassVar[Mapping[str, str]] = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_bias": "lora_B.bias",
        "bias": "base_layer.bias",
        "magnitude": "lora_magnitude_vector",
    }

    @staticmethod
    def shapes(base: Any, r: int) -> tuple[Shape, Shape]:
        return (r, base.in_features), (base.out_features, r)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return apply_weight(self.base, x, bias, weight)

    def branch(self, x: Tensor, adapter: LowRank, drop: Drop) -> Tensor:
        return lora_branch(drop(x), *adapter.arguments())

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None, adapter: LowRank) -> Tensor:
        x = x.to(weight.dtype) if isinstance(self.base, NF4Linear) else x
        return lora_linear(x, weight, bias, *adapter.arguments(), stored(self.base))

    def plain(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return dense_linear(weight, bias)


def magnitude_shape(lora_B: Tensor) -> Shape:
    """The shape that PEFT has for DoRA's m: (out), of a convolution (1, out, 1, …)."""
    return (lora_B.size(0),) if lora_B.dim() == 2 else (1, lora_B.size(0), *lora_B.shape[2:])


def ungrouped(weight: Tensor, groups: int) -> Tensor:
    """The weight of the same convolution without groups, (out, in/G, …) -> (out, in, …): zeros are added."""
    if groups == 1:
        return weight
    out, inner, *kernel = weight.shape
    whole = weight.new_zeros(groups, out // groups, groups, inner, *kernel)
    for group, block in enumerate(weight.unflatten(0, (groups, -1))):
        whole[group, :, group] = block
    return whole.flatten(2, 3).flatten(0, 1)
