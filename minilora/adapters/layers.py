"""Low-rank adapters of layers that store Wᵀ, for W (out, in), and adapters that start as a part of W.

transformers' Conv1D   stores Wᵀ as (in, out)
embedding              a row of Wᵀ (num, dim) for each index, whose one-hot vector is x
"""

import copy
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.lora import AdapterWrapper, Linear, LoraAdapter, LoraLinear, dense_linear, merge_weight


def shallow_copy(module: nn.Module, own: Mapping[str, Tensor | None]) -> nn.Module:
    """Return a copy of a module that shares its tensors, except for its `own` parameters: frozen, or None for none."""
    held = [*module.parameters(), *module.buffers()]
    copied = copy.deepcopy(module, {id(tensor): tensor for tensor in held})
    for name, tensor in own.items():
        where, _, last = name.rpartition(".")
        parameter = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
        copied.get_submodule(where).register_parameter(last, parameter)
    return copied


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the weight of a module as W (out, in)."""
    return weight if isinstance(module, Linear) else weight.T


def embedding_scale(module: nn.Module, dtype: torch.dtype) -> Tensor | float:
    """Return the factor of the rows that an embedding looks up."""
    scale: Tensor | float = getattr(module, "embed_scale", 1.0)
    return scale.to(dtype) if isinstance(scale, Tensor) else scale


class LoraConv1D(AdapterWrapper):
    """transformers' Conv1D, a linear layer that stores Wᵀ (final)."""

    PEFT_NAMES: ClassVar = LoraLinear.PEFT_NAMES

    def as_linear(self) -> LoraLinear:
        """Return a LoraLinear with the same adapters, whose weight is a view of this one's."""
        linear = LoraLinear(dense_linear(self.base.weight.T, self.base.bias), self.path, {})
        linear.adapters, linear.active = self.adapters, self.active
        return linear

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.as_linear()(x)
        return y

    def merged(self) -> nn.Module:
        return shallow_copy(self.base, {"weight": self.weight, "bias": self.bias})

    @property
    def weight(self) -> Tensor:
        return self.as_linear().merged_weight().T  # as it is stored

    @property
    def bias(self) -> Tensor | None:
        return self.as_linear().merged_bias()


class LoraEmbedding(AdapterWrapper):
    """An embedding: index i selects column i of W (dim, num) and column i of A (final).

    Dropout drops the adapter of an index as a whole, because its one-hot vector has only one number.
    """

    PEFT_NAMES: ClassVar = {**LoraLinear.PEFT_NAMES, "lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        for adapter in self.active_adapters():
            h = F.embedding(x, adapter.lora_A.T, self.base.padding_idx)
            h = adapter.scale * h * adapter.dropout(torch.ones_like(h[..., :1]))
            update = F.linear(h, adapter.lora_B).to(y.dtype) * embedding_scale(self.base, y.dtype)
            y = adapter.rescale(y + update, self.base.weight.T)
        return y

    def merged(self) -> nn.Module:
        return shallow_copy(self.base, {"weight": self.weight})

    @property
    def weight(self) -> Tensor:
        return merge_weight(self.base.weight.T, self.active_adapters()).T


LowRankWrapper = LoraLinear | LoraConv1D | LoraEmbedding


class InitSubtractedAdapter(LoraAdapter):
    """An adapter that starts as a part A₀, B₀ of W, which is subtracted: s·(B A - B₀ A₀), zero at the start (final).

    It is one of twice the rank, [B, -B₀] [A; A₀], whose second half is not trained, and is saved as such. So W stays as
    it is and is never rounded.
    """

    start_A: Tensor
    start_B: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], scale: float, dropout: float = 0.0):
        factors = ("lora_A", "lora_B", "start_A", "start_B")
        super().__init__({key: tensor for key, tensor in tensors.items() if key not in factors}, scale, dropout)
        self.trained = nn.ParameterDict({key: tensors[key] for key in ("lora_A", "lora_B")})
        self.register_buffer("start_A", tensors["start_A"])
        self.register_buffer("start_B", tensors["start_B"])

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]
        """[A; A₀]."""
        return torch.cat((self.trained["lora_A"], self.start_A))

    @property
    def lora_B(self) -> Tensor:  # type: ignore[override]
        """[B, -B₀]."""
        return torch.cat((self.trained["lora_B"], -self.start_B), dim=1)
