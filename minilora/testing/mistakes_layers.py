"""Mistakes in LoRA and DoRA layers, in merging and in sums of adapters: see `catalogue`.

The threads and libraries in comments are those where a mistake was seen.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.testing.implementations import LoRALayer, add_adapters, merge

Make = Callable[..., Any]


class Wrong(nn.Module):
    """A layer that computes `formula(layer, x)` in place of `layer(x)`."""

    def __init__(self, layer: Any, formula: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.layer, self.formula = layer, formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self.layer, x)


def with_formula(make: Make, formula: Callable[[Any, Tensor], Tensor]) -> Make:
    """Return a maker of layers that compute another formula."""
    return lambda *tensors, **options: Wrong(make(*tensors, **options), formula)


def without_rslora(make: Make) -> Make:
    """Return a maker that ignores `use_rslora`."""
    return lambda *tensors, use_rslora=False, **options: make(*tensors, **options)


def with_trained_weight(make: Make) -> Make:
    """Return a maker of layers that train a copy of W too."""

    def wrong(W: Tensor, *rest: Any, **options: Any) -> Wrong:
        weight = nn.Parameter(W.detach().clone())
        layer = Wrong(make(W, *rest, **options), lambda self, x: self(x) + F.linear(x, weight - weight.detach()))
        layer.register_parameter("weight", weight)
        return layer

    return wrong


# --- LoRA ---

lora = functools.partial(with_formula, LoRALayer)


def base(self: LoRALayer, x: Tensor) -> Tensor:
    return F.linear(x, self.W, self.b)


def delta(self: LoRALayer, x: Tensor) -> Tensor:
    """Return s·(x Aᵀ) Bᵀ."""
    return self.scale * F.linear(F.linear(x, self.A), self.B)


def drop(self: LoRALayer, x: Tensor) -> Tensor:
    return F.dropout(x, self.p, self.training)


def lora_sum(self: LoRALayer, x: Tensor) -> Tensor:
    """Return x Wᵀ + s·(dropout(x) Aᵀ) Bᵀ."""
    return F.linear(x, self.W) + delta(self, drop(self, x))


def with_update(update: Callable[[LoRALayer, Tensor], Tensor]) -> Make:
    """Return a maker of LoRA layers that add another update to the output of the base."""
    return lora(lambda self, x: base(self, x) + update(self, x))


def rescaled(factor: Callable[[LoRALayer], float]) -> Make:
    """Return a maker of LoRA layers with `factor(layer)` times the right scale."""
    return with_update(lambda self, x: factor(self) * delta(self, drop(self, x)))


def with_scale(scale: Callable[[float, int], float]) -> Make:
    """Return a maker of LoRA layers with this scale of alpha and r."""
    return lambda W, b, A, B, alpha, dropout=0.0, **_: LoRALayer(
        W, b, A, B, scale(alpha, len(A)) * len(A), dropout=dropout
    )


def plus_bias(self: Any, y: Tensor) -> Tensor:
    return y if self.b is None else y + self.b


def transposed_update(self: LoRALayer, x: Tensor) -> Tensor:
    product = self.B @ self.A
    return self.scale * F.linear(x, product.T if len(self.W) == x.shape[-1] else product)


def with_gradient(name: str, times: Callable[[LoRALayer], float]) -> Make:
    """Return a maker of LoRA layers whose gradient of A or B is `times(layer)` the right one."""

    def wrong(self: LoRALayer, x: Tensor) -> Tensor:
        factor = self.get_parameter(name)
        frozen = factor.detach()
        return torch.func.functional_call(self, {name: frozen + times(self) * (factor - frozen)}, x)

    return lora(wrong)


def without_masked_gradient(self: LoRALayer, x: Tensor) -> Tensor:
    update = delta(self, x)
    return base(self, x) + update + (delta(self, drop(self, x)) - update).detach()


def dropped_with_the_complement(self: LoRALayer, x: Tensor) -> Tensor:
    return base(self, x) + delta(self, F.dropout(x, 1 - self.p, self.training and self.p > 0))


def transposed_if_square(*names: str) -> Make:
    """Return a maker of LoRA layers that take some square tensors for their transposes."""

    def wrong(self: LoRALayer, x: Tensor) -> Tensor:
        tensors = {name: tensor for name, tensor in (*self.named_parameters(), *self.named_buffers()) if name in names}
        square = {name: tensor.T for name, tensor in tensors.items() if len(tensor) == len(tensor.T)}
        return torch.func.functional_call(self, square, x)

    return lora(wrong)


def merged_once(self: LoRALayer, x: Tensor) -> Tensor:
    if self.training:
        return self(x)
    if "merged" not in dict(self.named_buffers()):
        self.register_buffer("merged", (self.W + self.scale * self.B @ self.A).detach())
    return F.linear(x, self.get_buffer("merged"), self.b)


EITHER: Mapping[str, Make] = {
    "the scale is α·r": with_scale(lambda alpha, r: alpha * r),
    "the scale is α: it is not divided by r": with_scale(lambda alpha, r: alpha),  # Blaizzy/mlx-vlm#845
    "the scale is missing": with_scale(lambda alpha, r: 1.0),
    "the update is missing": lora(base),
    "a square B A is transposed": with_update(transposed_update),  # microsoft/LoRA#61
    "a square W is transposed": transposed_if_square("W"),
    "a square A is transposed": transposed_if_square("A"),
    "a square B is transposed": transposed_if_square("B"),
    "the update is computed in bfloat16": with_update(
        lambda self, x: self.scale * F.linear(F.linear(drop(self, x).bfloat16(), self.A.bfloat16()), self.B.bfloat16())
    ),
    "the bias is missing": lora(lora_sum),
    "the bias is added twice": lora(lambda self, x: plus_bias(self, self(x))),
    "a vector becomes a matrix of one row": lora(lambda self, x: self(torch.atleast_2d(x))),
    "dropout is never applied": with_update(delta),  # meta-pytorch/torchtune#996
    "dropout is applied in evaluation mode": with_update(  # karpathy/nanoGPT#240
        lambda self, x: delta(self, F.dropout(x, self.p))
    ),
    "dropout is applied to the input of the base": lora(
        lambda self, x: F.linear(drop(self, x), self.W + self.scale * self.B @ self.A, self.b)
    ),
    "dropout is applied behind A": with_update(
        lambda self, x: self.scale * F.linear(drop(self, F.linear(x, self.A)), self.B)
    ),
    "dropout lacks the factor 1/(1 - p)": rescaled(lambda self: 1 - self.p if self.training else 1.0),
    "one dropout mask is used for all rows": with_update(
        lambda self, x: delta(self, x * drop(self, x.new_ones(x.shape[-1])))
    ),
    "dropout is p where 1 - p was asked for": lora(dropped_with_the_complement),
    "dropout is applied to the update": with_update(lambda self, x: drop(self, delta(self, x))),
    "gradients do not pass through the dropout mask": lora(
        without_masked_gradient
    ),  # foundation-model-stack/fms-acceleration
    "the gradient of A lacks the scale": with_gradient("A", lambda self: 1 / self.scale),
    "the gradient of B lacks the scale": with_gradient("B", lambda self: 1 / self.scale),
    "the gradient of A has the scale twice": with_gradient("A", lambda self: self.scale),
    "the gradient of B has the scale twice": with_gradient("B", lambda self: self.scale),
    "the gradient of x lacks that of the update": with_update(lambda self, x: delta(self, drop(self, x.detach()))),
    "the base weight is trained": with_trained_weight(LoRALayer),
    "the weight merged in the first evaluation is kept": lora(merged_once),
}
LORA: Mapping[str, Make] = {
    **EITHER,
    "the scale is α/√r, rsLoRA's": with_scale(lambda alpha, r: alpha / math.sqrt(r)),
    "the scale is rounded down: α // r": with_scale(lambda alpha, r: alpha // r),
}
RSLORA: Mapping[str, Make] = {
    **EITHER,
    "the scale is α/r in spite of use_rslora": without_rslora(LoRALayer),  # NVIDIA/TensorRT-LLM#1668
    "the scale is α·√r": with_scale(lambda alpha, r: alpha * math.sqrt(r)),
}

# --- DoRA ---

DoRALayer = functools.partial(LoRALayer, use_dora=True)
dora = functools.partial(with_formula, DoRALayer)


def adapted(self: LoRALayer) -> Tensor:
    """Return W + s·B A."""
    return merge(self.W, self.A, self.B, self.scale)


def factor(self: LoRALayer) -> Tensor:
    """Return m / ‖W + s·B A‖."""
    return self.m / adapted(self).norm(dim=1).detach()


def with_factor(wrong: Callable[[LoRALayer], Tensor]) -> Make:
    """Return a maker of DoRA layers with another factor in place of m / ‖W + s·B A‖."""
    return dora(lambda self, x: plus_bias(self, wrong(self) * lora_sum(self, x)))


def dropout_of_the_difference(self: LoRALayer, x: Tensor) -> Tensor:
    difference = factor(self)[:, None] * adapted(self) - self.W
    return base(self, x) + F.linear(drop(self, x), difference)


def norm_of_the_first_call(self: LoRALayer) -> Tensor:
    if "norm" not in dict(self.named_buffers()):
        self.register_buffer("norm", adapted(self).norm(dim=1).detach())
    return self.m / self.get_buffer("norm")


def start_at_the_adapted_norm(
    W: Tensor, b: Any, A: Tensor, B: Tensor, alpha: float, magnitude: Tensor | None = None
) -> LoRALayer:
    magnitude = merge(W, A, B, alpha / len(A)).norm(dim=1) if magnitude is None else magnitude
    return LoRALayer(W, b, A, B, alpha, use_dora=True, magnitude=magnitude)


DORA: Mapping[str, Make] = {
    "DoRA is LoRA: there is no magnitude and no norm": with_factor(lambda self: torch.ones_like(self.m)),
    "the magnitude is not trained": with_factor(lambda self: factor(self).detach()),  # meta-pytorch/torchtune#2250
    "the magnitude starts at ‖W + s·B A‖": start_at_the_adapted_norm,
    "columns are normalized instead of rows": dora(  # catid/dora#4, nbasyl/DoRA#1
        lambda self, x: plus_bias(self, self.m * lora_sum(self, x / adapted(self).norm(dim=0).detach()))
    ),
    "the norm is that of W": with_factor(lambda self: self.m / self.W.norm(dim=1)),  # Comfy-Org/ComfyUI#15458
    "the gradient goes through the norm": with_factor(lambda self: self.m / adapted(self).norm(dim=1)),
    "the norm of the first call is kept": with_factor(norm_of_the_first_call),
    "the bias is scaled by m/‖W + s·B A‖": dora(lambda self, x: factor(self) * plus_bias(self, lora_sum(self, x))),
    "dropout is applied to (m/‖W + s·B A‖ - 1)·x Wᵀ": dora(dropout_of_the_difference),  # PEFT
    "the scale is α/r in spite of use_rslora": without_rslora(DoRALayer),
    "the base weight is trained": with_trained_weight(DoRALayer),
}

# --- merging, and sums of adapters ---


MERGE: Mapping[str, Make] = {
    "the scale is missing": lambda W, A, B, scale, *m: merge(W, A, B, 1.0, *m),
    "the update is added twice": lambda W, A, B, scale, *m: merge(W, A, B, 2 * scale, *m),  # huggingface/peft#3774
    "the weight that was given is changed": lambda W, *rest: W.copy_(merge(W.clone(), *rest)),
}
MERGE_DORA: Mapping[str, Make] = {
    **MERGE,
    "the magnitude is ignored": lambda W, A, B, scale, magnitude: merge(W, A, B, scale),
}

Adapters = Sequence[tuple[Tensor, Tensor, float]]


def factors_added(adapters: Adapters, weights: Sequence[float]) -> Tensor:
    if len({len(A) for A, _, _ in adapters}) > 1:
        return add_adapters(adapters, weights)
    A = torch.stack([A for A, _, _ in adapters]).sum(0)
    return torch.stack([w * scale * B for (_, B, scale), w in zip(adapters, weights, strict=True)]).sum(0) @ A


ADAPTER_SUM: Mapping[str, Make] = {
    "the weights are ignored": lambda adapters, weights: add_adapters(adapters, [1.0] * len(weights)),
    "the weights lose their sign": lambda adapters, weights: add_adapters(  # huggingface/peft#2796
        adapters, [abs(w) for w in weights]
    ),
    "the weights are applied to A and to B": lambda adapters, weights: add_adapters(adapters, [w * w for w in weights]),
    "the scales are ignored": lambda adapters, weights: add_adapters([(A, B, 1.0) for A, B, _ in adapters], weights),
    "A and B are added separately: (Σ w·s·B)(Σ A)": factors_added,
}
