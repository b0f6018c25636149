"""LoRA and DoRA: a frozen linear layer with trainable low-rank updates.

    LoRA   y = W x + b + s·B A x                     A (r, in), B (out, r), r ≪ in, out [LoRA eq. 3]
    DoRA   y = m ⊙ (W + s·B A) x / ‖W + s·B A‖ + b   m (out), ‖·‖ the norm of a row     [DoRA eq. 5]

W and b stay frozen. A starts random and B at zero, so a new adapter leaves the output unchanged.
`@definition` marks a function whose kernel, if it has one, runs unless `--plain` is given.

    in, out  features    r  rank    s  scale

    [LoRA]    Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models
    [rsLoRA]  Kalajdzievski 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA
    [DoRA]    Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation
"""

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


def lora_scale(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """Compute the factor s of the update: α/r  [LoRA §4.1], or α/√r  [rsLoRA]."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def lora_update(x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Apply the low-rank update to an input.

    Δy = (s·x Aᵀ) Bᵀ  [LoRA eq. 3]

    B A is never formed: x goes through A first, which leaves r numbers a row.

    Shapes: x (..., in), lora_A (r, in), lora_B (out, r) -> (..., out)
    """
    A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    return F.linear(scale * F.linear(x, A), B)


@definition
def lora_linear(
    x: Tensor, base: Linear, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: float
) -> Tensor:
    """Apply a linear layer with a low-rank update.

    y = x Wᵀ + b + (s·x Aᵀ) Bᵀ  [LoRA eq. 3]

    The bias is an argument because an adapter may train its own.

    Shapes: x (..., in), bias (out), lora_A (r, in), lora_B (out, r) -> (..., out)
    """
    return base_linear(x, base, bias) + lora_update(x, lora_A, lora_B, scale)


def base_linear(x: Tensor, base: Linear, bias: Tensor | None) -> Tensor:
    """Apply the weight of a linear layer, dense or 4-bit, with a given bias: x Wᵀ + b."""
    if isinstance(base, NF4Linear):
        return nf4_linear(x, base, bias)
    return F.linear(x, base.weight, bias)


def initial_factors(r: int, inner: int, out: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw A ~ U(-1/√in, 1/√in) and set B = 0.

    A must not be zero as well: the gradient of B is a product with A x.
    """
    bound = inner**-0.5
    A = torch.zeros(r, inner, dtype=torch.float32)
    B = torch.zeros(out, r, dtype=torch.float32)
    return {"lora_A": A.uniform_(-bound, bound, generator=generator), "lora_B": B}


class AdapterWrapper(nn.Module, ABC):
    """A wrapped module and its adapters by name; those in `active` apply, in order (abstract).

    A wrapper computes; an adapter is a module with the tensors. Its method `tensors()` returns
    what is saved, by name; `replaced()` returns the names of what it replaces. See `LoraAdapter`.
    """

    PEFT_NAMES: ClassVar[Mapping[str, str]] = {}  # of tensors in a file, where they differ

    def __init__(self, base: nn.Module, path: str, adapters: Mapping[str, nn.Module]):
        super().__init__()
        self.base: Any = base
        self.path = path
        self.adapters: Any = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.training = base.training
        for name, adapter in adapters.items():
            self.add(name, adapter)

    def add(self, name: str, adapter: nn.Module) -> None:
        """Add an adapter on the base's device. It is inactive until `active` names it."""
        example = next(self.base.parameters())
        try:
            self.adapters[name] = adapter if example.is_meta else adapter.to(example.device)
        except KeyError as error:  # it has a dot, or a ModuleDict has an attribute of this name
            raise TargetError(f"adapter name {name!r}: {error}") from error
        adapter.train(self.training)

    def active_adapters(self) -> list[Any]:
        return [self.adapters[name] for name in self.active]

    @abstractmethod
    def merged(self) -> nn.Module:
        """Return a plain module that computes the same; the base is unchanged."""

    def __getattr__(self, name: str) -> Any:
        """Forward names that the class lacks, such as `out_features`, to the base."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base" or name.startswith("__") or hasattr(type(self), name):
                raise  # also an error inside a property, which looks like a missing one
            return getattr(self.base, name)


class LoraLinear(AdapterWrapper):
    """A frozen linear layer and its adapters. An adapter may have a wider dtype than the weight."""

    PEFT_NAMES: ClassVar = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_bias": "lora_B.bias",
        "magnitude": "lora_magnitude_vector",
        "bias": "base_layer.bias",
    }

    def forward(self, x: Tensor) -> Tensor:
        """Compute W x + b + s·B A x. Other adapters add theirs; see `dora_forward`."""
        if not self.active:
            return self.base(x)
        x = x.to(self.base.dtype) if isinstance(self.base, NF4Linear) else x
        first, *others = self.active_adapters()
        if any(adapter.magnitude is not None for adapter in (first, *others)):
            return self.dora_forward(x)
        y = first(x, self.base, self.merged_bias())  # by lora_linear
        return sum((adapter.update(x) for adapter in others), start=y)

    def dora_forward(self, x: Tensor) -> Tensor:
        """Compute y ← m ⊙ (y + s·B A x) / ‖W + s·B A‖ for each adapter, from y = W x; then add b.

        Adapters are chained, as in `merge_weight`: m scales all of y, also what earlier ones added.
        As b is added last, a new adapter may change the last bit.
        """
        first, *others = self.active_adapters()
        weight, bias = self.base.weight, self.merged_bias()
        y = first.rescale(first(x, self.base, None), weight)
        for adapter in others:
            y = adapter.rescale(y + adapter.update(x), weight)
        return y if bias is None else y + bias.to(y.dtype)

    def merged_weight(self) -> Tensor:
        """Return the weight of a plain linear layer that computes the same."""
        return merge_weight(self.base.weight, self.active_adapters())

    def merged_bias(self) -> Tensor | None:
        """Return b, or an adapter's `bias` in its place, plus s·`lora_bias` of each adapter."""
        adapters, base = self.active_adapters(), self.base
        bias = next((a.bias for a in adapters if a.bias is not None), base.bias)
        for adapter in adapters:
            if adapter.lora_bias is not None:
                bias = adapter.scale * adapter.lora_bias + (0 if bias is None else bias)
        dtype = base.dtype if isinstance(base, NF4Linear) else base.weight.dtype
        return None if bias is None else bias.to(dtype)

    def merged(self) -> nn.Module:
        return dense_linear(self.merged_weight(), self.merged_bias())

    # In evaluation `nn.TransformerEncoderLayer` reads these instead of calling the layer.
    weight = property(merged_weight)
    bias = property(merged_bias)


class LoraAdapter(nn.Module):
    """One adapter of one layer: A, B, their scale s and dropout."""

    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor | None  # DoRA's m
    lora_bias: Tensor | None  # of B
    bias: Tensor | None  # in place of b

    def __init__(self, tensors: Mapping[str, Tensor], scale: float, dropout: float = 0.0):
        super().__init__()
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        absent = dict.fromkeys(("magnitude", "lora_bias", "bias"))
        for name, tensor in {**absent, **tensors}.items():
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are saved, by name."""
        held = {name: getattr(self, name) for name in LoraLinear.PEFT_NAMES}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def replaced(self) -> set[str]:
        """Return what the adapter takes the place of; only one active adapter of a layer can."""
        return set() if self.bias is None else {"bias"}

    def forward(self, x: Tensor, base: Linear, bias: Tensor | None) -> Tensor:
        """Return W x + b + s·B A x. Dropout acts on the adapter's x, not on the base's."""
        if self.training and self.dropout.p > 0:
            return base_linear(x, base, bias) + self.update(x)
        return lora_linear(x, base, bias, self.lora_A, self.lora_B, self.scale)

    def extra_repr(self) -> str:
        return f"r={len(self.lora_A)}, scale={self.scale:g}"

    def update(self, x: Tensor) -> Tensor:
        """Return s·B A x."""
        return lora_update(self.dropout(x), self.lora_A, self.lora_B, self.scale)

    def rescale(self, y: Tensor, weight: Tensor) -> Tensor:
        """Return m ⊙ y / ‖W + s·B A‖, or y without m."""
        if self.magnitude is None:
            return y
        ratio = self.magnitude / dora_norm(weight, self.lora_A, self.lora_B, self.scale)
        return (ratio * y).to(y.dtype)


@definition
def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Compute the norm of each row of the merged weight, treated as a constant in backward.

    c = ‖W + s·B A‖  [DoRA eq. 5, §4.3], in float32 at least, and above 0

    To differentiate c, autograd would have to keep W + s·B A. One norm per output; the paper
    has W as (in, out).

    Shapes: weight (out, in), lora_A (r, in), lora_B (out, r) -> (out)
    """
    wide = widest(weight, lora_A)
    with torch.no_grad(), no_autocast(weight.device.type):
        delta = lora_delta(lora_A.to(wide), lora_B.to(wide), scale)
        norm = (weight.to(wide) + delta).norm(dim=1)
    return norm.clamp(min=torch.finfo(torch.float32).tiny)


def lora_delta(lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Compute the update as a matrix, ΔW = s·B A  [LoRA eq. 3].

    Shapes: lora_A (r, in), lora_B (out, r) -> (out, in)
    """
    return scale * (lora_B @ lora_A)


@definition
def merge_weight(weight: Tensor, adapters: Sequence[LoraAdapter]) -> Tensor:
    """Fold adapters into a weight, one after the other.

    W′ ← W′ + s·B A, or with DoRA W′ ← m ⊙ (W′ + s·B A) / ‖W + s·B A‖, rounded once to W's dtype
    """
    if not adapters:
        return weight
    wide = widest(weight, *(adapter.lora_A for adapter in adapters))
    merged = weight.to(wide)
    for adapter in adapters:
        with no_autocast(weight.device.type):
            delta = lora_delta(adapter.lora_A.to(wide), adapter.lora_B.to(wide), adapter.scale)
            merged = merged + delta
        merged = adapter.rescale(merged.T, weight.to(wide)).T
    return merged.to(weight.dtype)


def widest(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that loses nothing of these tensors, float32 at least."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Build a frozen linear layer from weight (out, in) and bias (out)."""
    linear = nn.Linear(weight.size(1), weight.size(0), bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
