"""Wrappers of other layers that apply a linear map W (out, in), and of parameters that are no layer's weight.

transformers' Conv1D   W is stored as (in, out)
embedding              a row of Wᵀ (num, dim) for each index, whose one-hot vector is x
convolution            W is stored as (out, in/groups, *kernel); in is channels times kernel
target_parameters      a matrix W, or one for each of E experts, stacked (E, out, in)

G  groups of a convolution's channels    E  experts    r  rank
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from minilora.adapters.config import LoraConfig
from minilora.errors import ConfigError, TargetError
from minilora.lora import AdapterLinear, AdapterWrapper, LoraAdapter, Shape

CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


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


class AdapterConv(_OtherLayer):
    """A convolution in one, two or three dimensions (final).

    A is a convolution to r channels with the base's kernel, stride, padding and dilation; B has a kernel of size 1.
    With groups, A sees all channels and B only those of its group, as in PEFT. Their product is not a grouped
    convolution, so a merged layer has no groups.

    Shapes: A (r, in, *kernel), B (out, r/G, 1, …)
    """

    @staticmethod
    def shapes(base: Any, r: int) -> tuple[Shape, Shape]:
        """See `AdapterLinear`; raise a `ConfigError` if the groups do not divide r."""
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


class Stacked(nn.Module):
    """s·B A of one adapter for one parameter of E experts, or of a plain matrix.

    Shapes: lora_A (E·r, in), lora_B (out, r·E)
    """

    def __init__(self, scale: float, lora_A: Tensor, lora_B: Tensor):
        super().__init__()
        self.scale = scale
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)

    def added(self, weight: Tensor, is_transposed: bool) -> Tensor:
        """Return W + s·B A of each expert: (E, out, in), transposed (E, in, out), or (out, in), in W's dtype."""
        experts = experts_of(weight)
        wide = torch.promote_types(weight.dtype, self.lora_A.dtype)
        lora_A = self.lora_A.to(wide).unflatten(0, (experts, -1))  # (E, r, in)
        lora_B = self.lora_B.to(wide).unflatten(1, (-1, experts)).permute(2, 0, 1)  # (E, out, r)
        delta = self.scale * (lora_B @ lora_A)
        if weight.dim() == 2:
            delta = delta[0]
        elif is_transposed:
            delta = delta.mT
        return (weight + delta).to(weight.dtype)


class AdapterParameters(AdapterWrapper):
    """A module some of whose parameters have adapters, such as experts stacked in one tensor (final).

    Its forward runs with W + s·B A in place of the parameter, for that call alone. Each expert has its own factors,
    which PEFT stores in two matrices: A (E·r, in), one expert after the other, and B (out, r·E), with the expert as the
    fastest index.
    """

    def build(self, config: LoraConfig, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Build an adapter of each parameter's `<parameter>.lora_A` and `<parameter>.lora_B`, in the module's order."""
        stacked = {}
        for key in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
            scale = config.scale(f"{self.path}.{key}")
            stacked[key] = Stacked(scale, tensors[f"{key}.lora_A"], tensors[f"{key}.lora_B"])
        return nn.ModuleDict(stacked)

    def conflicting_adapters(self, names: Sequence[str]) -> list[str]:
        return []

    def peft_tensors(self, name: str) -> dict[str, Tensor]:
        """See `AdapterWrapper`. PEFT nests a wrapper for each parameter; that of the first one is innermost."""
        held = self.adapters[name]
        return {
            f"{'base_layer.' * depth}{factor}.weight": getattr(held[key], factor)
            for depth, key in enumerate(reversed(list(held)))
            for factor in ("lora_A", "lora_B")
        }

    def changed_parameters(self) -> dict[str, Tensor]:
        """Return what the active adapters make of the parameters, by name."""
        changed: dict[str, Tensor] = {}
        for name in self.active:
            for key, stacked in self.adapters[name].items():
                weight = changed.get(key, self.base.get_parameter(key))
                changed[key] = stacked.added(weight, is_transposed(self.base))
        return changed

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the changed parameters."""
        return functional_call(self.base, self.changed_parameters(), args, kwargs)

    def merged(self) -> nn.Module:
        return shallow_copy(self.base, self.changed_parameters())


def experts_of(weight: Tensor) -> int:
    """Return the number of matrices in a parameter."""
    return weight.size(0) if weight.dim() == 3 else 1


def is_transposed(module: nn.Module) -> bool:
    """Return whether the experts' weights are (E, in, out), from the attribute of transformers' modules."""
    return bool(getattr(module, "is_transposed", False))


def stacked_shapes(module: nn.Module, name: str, r: int) -> tuple[Shape, Shape]:
    """Return the shapes of A and B for one of the module's parameters, by its full name."""
    weight = module.get_parameter(name.rpartition(".")[2])
    if weight.dim() not in (2, 3):
        raise TargetError(f"{name}: is {tuple(weight.shape)}, target_parameters need (out, in) or (experts, out, in)")
    out, inner = weight.mT.shape[-2:] if weight.dim() == 3 and is_transposed(module) else weight.shape[-2:]
    return (experts_of(weight) * r, inner), (out, r * experts_of(weight))
