"""Mistakes of LoRA, rsLoRA and DoRA layers, of merged weights and of sums of adapters: a part of the `catalogue`."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.testing.implementations import LoRALayer, add_adapters, merge

Make = Callable[..., Any]
LAYERS = dict[str, Mapping[str, Make]]()  # by kind


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


# --- LoRA ---

lora = partial(with_formula, LoRALayer)


def base(self: LoRALayer, x: Tensor) -> Tensor:
    return F.linear(x, self.W, self.b)


def adapted(self: LoRALayer) -> Tensor:
    """Return W + s·B A."""
    return merge(self.W, self.A, self.B, self.scale)


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


def with_scale(scale: Callable[[float, int], float]) -> Make:
    """Return a maker of LoRA layers with this scale of alpha and r."""
    return lambda W, b, A, B, alpha, dropout=0.0, **_: LoRALayer(W, b, A, B, scale(alpha, len(A)) * len(A), dropout)


def plus_bias(self: Any, y: Tensor) -> Tensor:
    return y if self.b is None else y + self.b


def with_tensor(name: str, change: Callable[[LoRALayer, Tensor], Tensor]) -> Make:
    """Return a maker of LoRA layers that compute with `change(layer, tensor)` in place of W, A or B."""
    return lora(lambda self, x: torch.func.functional_call(self, {name: change(self, getattr(self, name))}, x))


def gradient_times(times: Callable[[LoRALayer], float]) -> Callable[[LoRALayer, Tensor], Tensor]:
    """Return a function that leaves a tensor as it is, and makes its gradient `times(layer)` the right one."""
    return lambda self, own: own.detach() + times(self) * (own - own.detach())


def transposed(self: LoRALayer, matrix: Tensor) -> Tensor:
    return matrix.T if len(matrix) == len(matrix.T) else matrix


EITHER: Mapping[str, Make] = {
    "the scale is α·r": with_scale(lambda alpha, r: alpha * r),
    "the scale is α: it is not divided by r": with_scale(lambda alpha, r: alpha),  # Blaizzy/mlx-vlm#845
    "the scale is missing": with_scale(lambda alpha, r: 1.0),
    "the update is missing": lora(base),
    "the update is added twice": with_update(lambda self, x: 2 * delta(self, drop(self, x))),
    "a square B A is transposed": with_update(  # microsoft/LoRA#61
        lambda self, x: self.scale * F.linear(x, transposed(self, self.B @ self.A))
    ),
    **{f"a square {name} is transposed": with_tensor(name, transposed) for name in ("W", "A", "B")},
    "the update is computed in bfloat16": with_update(
        lambda self, x: self.scale * F.linear(F.linear(drop(self, x).bfloat16(), self.A.bfloat16()), self.B.bfloat16())
    ),
    "the bias is missing": lora(lora_sum),
    "the bias is added twice": lora(lambda self, x: plus_bias(self, self(x))),
    "the bias is multiplied by s": lora(lambda self, x: self.scale * plus_bias(self, lora_sum(self, x) / self.scale)),
    "dropout is never applied": with_update(delta),  # meta-pytorch/torchtune#996
    "dropout is applied to the input of the base": lora(lambda self, x: F.linear(drop(self, x), adapted(self), self.b)),
    "dropout is applied behind A": with_update(lambda self, x: self.scale * drop(self, x @ self.A.T) @ self.B.T),
    "dropout lacks the factor 1/(1 - p)": with_update(
        lambda self, x: delta(self, drop(self, x)) * (1 - self.p if self.training else 1.0)
    ),
    "dropout is p where 1 - p was asked for": with_update(
        lambda self, x: delta(self, F.dropout(x, 1 - self.p, self.training and self.p > 0))
    ),
    "dropout is applied to the update": with_update(lambda self, x: drop(self, delta(self, x))),
    "gradients do not pass through the dropout mask": with_update(  # fms-acceleration
        lambda self, x: delta(self, x) + (delta(self, drop(self, x)) - delta(self, x)).detach()
    ),
    "the gradient of A lacks the scale": with_tensor("A", gradient_times(lambda self: 1 / self.scale)),
    "the gradient of B lacks the scale": with_tensor("B", gradient_times(lambda self: 1 / self.scale)),
    "the gradient of A has the scale twice": with_tensor("A", gradient_times(lambda self: self.scale)),
    "the gradient of B has the scale twice": with_tensor("B", gradient_times(lambda self: self.scale)),
    "the gradient of x lacks that of the update": with_update(lambda self, x: delta(self, drop(self, x.detach()))),
}
LAYERS["lora"] = {
    **EITHER,
    "the scale is α/√r, rsLoRA's": with_scale(lambda alpha, r: alpha / math.sqrt(r)),
    "the scale is rounded down: α // r": with_scale(lambda alpha, r: alpha // r),
}
LAYERS["rslora"] = {
    **EITHER,
    "the scale is α/r in spite of use_rslora": with_scale(lambda alpha, r: alpha / r),  # NVIDIA/TensorRT-LLM#1668
    "the scale is α·√r": with_scale(lambda alpha, r: alpha * math.sqrt(r)),
}

# --- DoRA ---

DoRALayer = partial(LoRALayer, use_dora=True)
dora = partial(with_formula, DoRALayer)


def factor(self: LoRALayer) -> Tensor:
    """Return m / ‖W + s·B A‖."""
    return self.m / adapted(self).norm(dim=1).detach()


def with_factor(wrong: Callable[[LoRALayer], Tensor]) -> Make:
    """Return a maker of DoRA layers with another factor in place of m / ‖W + s·B A‖."""
    return dora(lambda self, x: plus_bias(self, wrong(self) * lora_sum(self, x)))


LAYERS["dora"] = {
    "DoRA is LoRA: there is no magnitude and no norm": with_factor(lambda self: torch.ones_like(self.m)),
    "the magnitude is not trained": with_factor(lambda self: factor(self).detach()),  # meta-pytorch/torchtune#2250
    "columns are normalized instead of rows": dora(  # catid/dora#4, nbasyl/DoRA#1
        lambda self, x: plus_bias(self, self.m * lora_sum(self, x / adapted(self).norm(dim=0).detach()))
    ),
    "the norm lacks the scale": with_factor(lambda self: self.m / (self.W + self.B @ self.A).norm(dim=1).detach()),
    "the magnitude is |m|": with_factor(lambda self: self.m.abs() / adapted(self).norm(dim=1).detach()),
    "the norm is that of W": with_factor(lambda self: self.m / self.W.norm(dim=1)),  # Comfy-Org/ComfyUI#15458
    "the gradient goes through the norm": with_factor(lambda self: self.m / adapted(self).norm(dim=1)),
    "the bias is scaled by m/‖W + s·B A‖": dora(lambda self, x: factor(self) * plus_bias(self, lora_sum(self, x))),
    "dropout is applied to the input of the base": dora(
        lambda self, x: plus_bias(self, factor(self) * F.linear(drop(self, x), adapted(self)))
    ),
    "dropout is applied to (m/‖W + s·B A‖ - 1)·x Wᵀ": dora(  # PEFT
        lambda self, x: base(self, x) + F.linear(drop(self, x), factor(self)[:, None] * adapted(self) - self.W)
    ),
    "the scale is α/r in spite of use_rslora": lambda *given, use_rslora=False, **options: DoRALayer(*given, **options),
}

# --- merging, and sums of adapters ---

LAYERS["merge"] = {
    "the scale is missing": lambda W, A, B, scale, *m: merge(W, A, B, 1.0, *m),
    "the update is added twice": lambda W, A, B, scale, *m: merge(W, A, B, 2 * scale, *m),  # huggingface/peft#3774
}
LAYERS["merge_dora"] = {
    **LAYERS["merge"],
    "the magnitude is ignored": lambda W, A, B, scale, magnitude: merge(W, A, B, scale),
    "columns are normalized instead of rows": lambda W, A, B, s, m: m[:, None] * F.normalize(merge(W, A, B, s), dim=0),
    "the norm is that of W": lambda W, A, B, scale, m: (m / W.norm(dim=1))[:, None] * merge(W, A, B, scale),
}


def factors_added(adapters: Sequence[tuple[Tensor, Tensor, float]], weights: Sequence[float]) -> Tensor:
    if len({len(A) for A, _, _ in adapters}) > 1:
        return add_adapters(adapters, weights)
    A = torch.stack([A for A, _, _ in adapters]).sum(0)
    return torch.stack([w * scale * B for (_, B, scale), w in zip(adapters, weights, strict=True)]).sum(0) @ A


LAYERS["adapter_sum"] = {
    "the weights are ignored": lambda adapters, weights: add_adapters(adapters, [1.0] * len(weights)),
    "the weights lose their sign": lambda adapters, weights: add_adapters(  # huggingface/peft#2796
        adapters, [abs(w) for w in weights]
    ),
    "the weights are applied to A and to B": lambda adapters, weights: add_adapters(adapters, [w * w for w in weights]),
    "the scales are ignored": lambda adapters, weights: add_adapters([(A, B, 1.0) for A, B, _ in adapters], weights),
    "A and B are added separately: (Σ w·s·B)(Σ A)": factors_added,
}
