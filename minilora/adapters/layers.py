"""Wrappers of other layers that apply a linear map W (out, in).

transformers' Conv1D   W is stored as (in, out)
embedding              a row of Wᵀ (num, dim) for each index, whose one-hot vector is x
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.lora import AdapterLinear, AdapterWrapper, LoraAdapter, Shape


def get_base_layer(module: nn.Module) -> nn.Module:
    """Return the module of the model itself, without the wrappers around it."""
    while isinstance(module, AdapterWrapper):
        module = module.base
    return module


def shallow_copy(module: nn.Module, own: Mapping[str, Tensor | None]) -> nn.Module:
    """Return a copy of a module that shares its tensors, except for its `own` parameters: frozen, or None for none."""
    held = [*module.parameters(), *module.buffers()]
    copied = copy.deepcopy(module, {id(tensor): tensor for tensor in held})
    for name, tensor in own.items():
        where, _, last = name.rpartition(".")
        parameter = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
        copied.get_submodule(where).register_parameter(last, parameter)
    return copied


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
