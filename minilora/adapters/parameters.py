"""Adapters of parameters that are not a layer's weight (`target_parameters`), such as experts stacked in one tensor.

The module's forward runs with W + s·B A in place of the parameter, for that call alone. Each of E experts has its own
factors, which PEFT stores in two matrices:

    A (E·r, in), one expert after the other     B (out, r·E), with the expert as the fastest index
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from minilora.adapters.config import LoraConfig
from minilora.adapters.find import shallow_copy
from minilora.errors import TargetError
from minilora.lora import AdapterWrapper, Shape


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
    """A module some of whose parameters have adapters (final)."""

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
        """Call the module with the changed parameters.

        Raises:
            TargetError: in a mixed batch; one call has one set of parameters.
        """
        if self.mixed is not None:
            raise TargetError(f"{self.path}: target_parameters cannot be mixed in one batch")
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
    """Return the shapes of A and B for one of the module's parameters, by its full name.

    Raises:
        TargetError: it is neither a matrix nor a stack of matrices.
    """
    weight = module.get_parameter(name.rpartition(".")[2])
    if weight.dim() not in (2, 3):
        raise TargetError(f"{name}: is {tuple(weight.shape)}, target_parameters need (out, in) or (experts, out, in)")
    out, inner = weight.mT.shape[-2:] if weight.dim() == 3 and is_transposed(module) else weight.shape[-2:]
    return (experts_of(weight) * r, inner), (out, r * experts_of(weight))
