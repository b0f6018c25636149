"""LoRA and DoRA: a frozen linear layer with trainable low-rank updates.

    LoRA   y = W x + b + s·B A x                        A (r, in), B (out, r), r ≪ in, out    [LoRA eq. 3]
    DoRA   y = m ⊙ (W + s·B A) x / ‖W + s·B A‖ + b      m (out), ‖·‖ the norm of each row     [DoRA eq. 5]

W and b stay frozen. A starts random and B at zero, so a new adapter leaves the layer's output unchanged.

    N  rows of x    in, out  features    r  rank    s  scale

    [LoRA]    Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models
    [rsLoRA]  Kalajdzievski 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA
    [DoRA]    Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.definition import definition, no_autocast
from minilora.errors import TargetError
from minilora.nf4 import NF4Linear, nf4_linear

Linear = nn.Linear | NF4Linear
Shape = tuple[int, ...]


def lora_scale(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """Compute the factor s of the update: α/r  [LoRA §4.1], or α/√r  [rsLoRA], stable as r grows."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def lora_update(x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Apply the low-rank update to an input.

    Δy = (s·x Aᵀ) Bᵀ  [LoRA eq. 3]

    B A is never formed: x goes through A first. A and B may be kept in a wider dtype; they are rounded to that of x.

    Shapes: x (..., in), lora_A (r, in), lora_B (out, r) -> (..., out)
    """
    A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    return F.linear(scale * F.linear(x, A), B)


@definition
def lora_linear(x: Tensor, base: Linear, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Apply a linear layer with a low-rank update.

    y = x Wᵀ + b + (s·x Aᵀ) Bᵀ  [LoRA eq. 3]

    W is the base's weight, dense or in four bits. b is given, because an adapter may train its own.
    The gradients, with h = s·dy B: dx = dy W + h A, dA = hᵀ x, dB = dyᵀ (s·x Aᵀ), and none of a frozen W and b.

    Shapes: x (..., in), bias (out), lora_A (r, in), lora_B (out, r) -> (..., out)
    """
    return base_linear(x, base, bias) + lora_update(x, lora_A, lora_B, scale)


def base_linear(x: Tensor, base: Linear, bias: Tensor | None) -> Tensor:
    """Apply the weight of a linear layer with a given bias: x Wᵀ + b."""
    return nf4_linear(x, base, bias) if isinstance(base, NF4Linear) else F.linear(x, base.weight, bias)


def lora_delta(lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Compute the update as a matrix, ΔW = s·B A  [LoRA eq. 3].

    Shapes: lora_A (r, in), lora_B (out, r) -> (out, in)
    """
    return scale * (lora_B @ lora_A)


@definition
def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Compute the norm of each row of the merged weight, as a constant for the gradient.

    c = ‖W + s·B A‖  [DoRA eq. 5, §4.3], in float32 at least, and above 0

    One norm per output, as in the authors' code; the paper's columns are those of W as (in, out).

    Shapes: weight (out, in), lora_A (r, in), lora_B (out, r) -> (out)
    """
    wide = functools.reduce(torch.promote_types, (weight.dtype, lora_A.dtype, torch.float32))
    with torch.no_grad(), no_autocast(weight.device.type):
        norm = (weight.to(wide) + lora_delta(lora_A.to(wide), lora_B.to(wide), scale)).norm(dim=1)
    return norm.clamp(min=torch.finfo(torch.float32).tiny)


class LoraAdapter(nn.Module):
    """One adapter of one layer: its scale, its dropout, and its tensors.

    `lora_A` and `lora_B`; optionally `magnitude` (DoRA's m), `lora_bias` (of B, scaled by s), `bias` (for the base's).
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    magnitude: Any  # a parameter, or None

    def __init__(self, tensors: Mapping[str, Tensor], scale: float, dropout: float = 0.0):
        super().__init__()
        self.scale, self.dropout = scale, nn.Dropout(dropout)  # `runs.seeded` seeds it by step in `train`
        for name in ("lora_A", "lora_B", "lora_bias", "bias", "magnitude"):
            self.register_parameter(name, nn.Parameter(tensors[name]) if name in tensors else None)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B; an adapter that starts as a part of W adds its start to them (`adapters.parts`)."""
        return self.lora_A, self.lora_B

    def extra_repr(self) -> str:
        return f"r={len(self.lora_A)}, scale={self.scale:g}"


class AdapterWrapper(nn.Module, ABC):
    """Base class of modules that wrap a module of the model and hold its adapters by name (abstract).

    `active` names the adapters in use, in order.
    """

    def __init__(self, base: nn.Module, path: str):
        super().__init__()
        self.base: Any = base
        self.path = path
        self.adapters: Any = nn.ModuleDict()
        self.configs: dict[str, Any] = {}  # that each adapter was made from, or None
        self.active: tuple[str, ...] = ()
        self.train(base.training)

    def __getattr__(self, name: str) -> Any:
        """Forward unknown attributes, such as `out_features`, to the base."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base" or name.startswith("__"):
                raise
            return getattr(self.current(), name)

    def add_adapter(self, name: str, adapter: nn.Module, config: Any = None) -> None:
        """Add an adapter on the base's device. It is inactive until `active` names it."""
        if name in self.configs:
            raise TargetError(f"{self.path} has an adapter {name!r} already; it has {sorted(self.configs)}")
        example = next(self.base.parameters())
        self.adapters[name] = adapter if example.is_meta else adapter.to(example.device)
        self.configs[name] = config
        adapter.train(self.training)

    def own_parameters(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of one adapter, without those that it shares with the base."""
        shared = {id(parameter) for parameter in self.base.parameters()}
        return [parameter for parameter in self.adapters[name].parameters() if id(parameter) not in shared]

    def current(self) -> Any:
        """Return the module to which unknown attributes are forwarded."""
        return self.base

    @abstractmethod
    def conflicting_adapters(self, names: Sequence[str]) -> list[str]:
        """Return those of the adapters that train the same parameter; two of them cannot be active together."""

    @abstractmethod
    def peft_tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of an adapter by the ends of their names in PEFT's file: after the module's path."""

    @abstractmethod
    def merged(self) -> nn.Module:
        """Build a plain module equal to the base with its active adapters; the base is unchanged."""


class AdapterLinear(AdapterWrapper):
    """A frozen linear layer with low-rank adapters in a dtype of their own; `adapters.layers` subclasses it."""

    PEFT_NAMES: ClassVar[Mapping[str, str]] = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_bias": "lora_B.bias",
        "bias": "base_layer.bias",
        "magnitude": "lora_magnitude_vector",
    }

    def forward(self, x: Tensor) -> Tensor:
        """Return merged_weight() x + merged_bias(), without forming the merged weight.

        For each adapter in turn y ← y + s·B A x, with DoRA y ← m ⊙ (y + s·B A x) / ‖W + s·B A‖. m does not scale b,
        which is added last: there a new adapter of DoRA may change the last bit.
        """
        if not self.active:
            return self.base(x)
        x = x.to(self.base.dtype) if isinstance(self.base, NF4Linear) else x
        first, *others = (self.adapters[name] for name in self.active)
        bias, has_dora = self.merged_bias(), any(each.magnitude is not None for each in (first, *others))
        y = self.apply_magnitude(self.lora_forward(x, None if has_dora else bias, first), first)  # one kernel
        for adapter in others:
            y = self.apply_magnitude(y + self.lora_update(x, adapter), adapter)
        return y + bias.to(y.dtype) if has_dora and bias is not None else y

    def lora_forward(self, x: Tensor, bias: Tensor | None, adapter: LoraAdapter) -> Tensor:
        """Return W x + b + s·B A x."""
        if adapter.training and adapter.dropout.p > 0:
            return self.base_forward(x, bias) + self.lora_update(x, adapter)
        return lora_linear(x, self.base, bias, *adapter.factors(), adapter.scale)

    def base_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return W x + b."""
        return base_linear(x, self.base, bias)

    def lora_update(self, x: Tensor, adapter: LoraAdapter) -> Tensor:
        """Return s·B A x; dropout acts on this x, never on the base's."""
        return lora_update(adapter.dropout(x), *adapter.factors(), adapter.scale)

    def apply_magnitude(self, y: Tensor, adapter: LoraAdapter) -> Tensor:
        """Return m ⊙ y / ‖W + s·B A‖, or y if the adapter has no magnitude."""
        if adapter.magnitude is None:
            return y
        return (self.magnitude_ratio(adapter, self.base.weight) * y).to(y.dtype)

    def magnitude_ratio(self, adapter: LoraAdapter, weight: Tensor) -> Tensor:
        """Return m / ‖W + s·B A‖, (out)."""
        ratio: Tensor = adapter.magnitude / dora_norm(self.as_matrix(weight), *adapter.factors(), adapter.scale)
        return ratio

    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """Return what the active adapters make of the base's weight, or of a given one, rounded once to its dtype."""
        weight = self.base.weight if weight is None else weight
        adapters = [self.adapters[name] for name in self.active]
        wide = functools.reduce(torch.promote_types, (weight.dtype, torch.float32, *(a.lora_A.dtype for a in adapters)))
        merged = self.as_matrix(weight).to(wide)
        for adapter in adapters:
            A, B = (factor.to(wide) for factor in adapter.factors())
            with no_autocast(weight.device.type):
                merged = merged + lora_delta(A, B, adapter.scale)
            if adapter.magnitude is not None:
                merged = self.magnitude_ratio(adapter, weight.to(wide)).to(wide).unsqueeze(1) * merged
        return self.from_matrix(merged).to(weight.dtype) if adapters else weight

    def merged_bias(self) -> Tensor | None:
        """Return b, or what an adapter trained in its place, plus s·b_B of each B that has a bias: (out), or None."""
        adapters = [self.adapters[name] for name in self.active]
        bias = next((each.bias for each in adapters if each.bias is not None), getattr(self.base, "bias", None))
        for added in (each.scale * each.lora_bias for each in adapters if each.lora_bias is not None):
            bias = added if bias is None else bias + added
        return None if bias is None else bias.to(self.dtype)

    def merged(self) -> nn.Module:
        return dense_linear(self.merged_weight(), self.merged_bias())

    weight = property(merged_weight)  # for models that read a layer's weight and bias
    bias = property(merged_bias)

    @property
    def dtype(self) -> Any:
        """The dtype that the base computes in."""
        return self.base.dtype if isinstance(self.base, NF4Linear) else self.base.weight.dtype

    def conflicting_adapters(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.configs and self.adapters[name].bias is not None]

    def peft_tensors(self, name: str) -> dict[str, Tensor]:
        adapter = self.adapters[name]
        tensors = dict(adapter.named_parameters()) | dict(zip(("lora_A", "lora_B"), adapter.factors(), strict=True))
        return {self.PEFT_NAMES[key]: tensor for key, tensor in tensors.items()}

    # The identity for a linear; other layers override these three (`adapters.layers`).
    @staticmethod
    def shapes(base: Any, r: int) -> tuple[Shape, Shape]:
        """Return the shapes of A and of B for an adapter of a base."""
        return (r, base.in_features), (base.out_features, r)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return the base's weight as W (out, in)."""
        return weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Return W (out, in) in the form of the base's weight."""
        return matrix


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Build a frozen linear layer that holds these tensors: weight (out, in), bias (out)."""
    linear = nn.Linear(weight.size(1), weight.size(0), bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
