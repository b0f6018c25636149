"""Planted mistakes in DoRA layers, in merging and in sums of adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.testing.implementations import DoRALayer
from minilora.testing.mutants_lora import (
    Around,
    Plant,
    Table,
    alpha_is,
    around,
    base,
    branch,
    drop,
    gradient_times,
    scale_of,
    without,
    wrapped,
)

# --- DoRA ---


def dora(rule: Callable[[DoRALayer, Tensor], Tensor]) -> Plant:
    """Plant a formula of a DoRALayer's tensors in place of the correct layer."""
    return lambda _: around(rule)(DoRALayer)


def adapted(self: DoRALayer, scale: float | None = None) -> Tensor:
    return self.lora.W + (self.lora.scale if scale is None else scale) * self.lora.B @ self.lora.A


def plus_bias(self: DoRALayer, y: Tensor) -> Tensor:
    return y if self.b is None else y + self.b


def weighted(weights: Callable[[DoRALayer], Tensor]) -> Plant:
    """Plant a layer with another factor in place of m / norm."""
    return dora(lambda self, x: plus_bias(self, weights(self) * self.lora(x)))


def normalized_by(norm: Callable[[DoRALayer], Tensor]) -> Plant:
    """Plant a layer with another norm."""
    return weighted(lambda self: self.m / norm(self))


def factor(self: DoRALayer) -> Tensor:
    return self.m / adapted(self).norm(dim=1).detach()


def norm_of_the_first_call(self: DoRALayer) -> Tensor:
    if "norm" not in dict(self.named_buffers()):
        self.register_buffer("norm", adapted(self).norm(dim=1).detach())
    return self.get_buffer("norm")


def scale_outside(self: DoRALayer, x: Tensor) -> Tensor:
    V = adapted(self, scale=1.0)
    change = (self.m / V.norm(dim=1).detach())[:, None] * V - self.lora.W
    return plus_bias(self, base(self.lora, x) + self.lora.scale * F.linear(drop(self.lora, x), change))


def starts_at_the_adapted_norm(make: Any, W: Tensor, b: Any, A: Tensor, B: Tensor, alpha: float, **o: Any) -> Any:
    o.setdefault("magnitude", (W + scale_of(A, alpha, **o) * B @ A).detach().norm(dim=1))
    return make(W, b, A, B, alpha, **o)


def rslora_not_in_the_norm(make: Any, W: Tensor, b: Any, A: Tensor, B: Tensor, alpha: float, **o: Any) -> Around:
    rule = normalized_by(lambda self: adapted(self, alpha / len(A)).norm(dim=1).detach())
    return rule(make)(W, b, A, B, alpha, **o)


DORA: Table = [
    # the magnitude
    ("DoRA is LoRA: the magnitude does nothing", weighted(lambda self: torch.ones_like(self.m))),
    ("the magnitude is not trained", weighted(lambda self: factor(self).detach()), "meta-pytorch/torchtune#2250"),
    ("a given magnitude is ignored", without("magnitude")),
    ("the magnitude starts at the norm of W + s·B A", lambda _: wrapped(starts_at_the_adapted_norm)(DoRALayer)),
    ("m / norm is applied twice", weighted(lambda self: factor(self) ** 2)),
    (
        "the magnitude's gradient has m / norm twice",
        weighted(lambda self: gradient_times(factor(self).detach(), factor(self))),
        "axolotl-ai-cloud/axolotl#3528",
    ),
    # the norm
    (
        "columns are normalized instead of rows",
        dora(lambda self, x: plus_bias(self, self.m * self.lora(x / adapted(self).norm(dim=0).detach()))),
        "catid/dora#4, nbasyl/DoRA#1",
    ),
    ("the norm of W alone", normalized_by(lambda self: self.lora.W.norm(dim=1)), "Comfy-Org/ComfyUI#15458"),
    ("the norm lacks the scale", normalized_by(lambda self: adapted(self, 1.0).norm(dim=1).detach())),
    ("one norm for the whole matrix", normalized_by(lambda self: adapted(self).norm().detach())),
    ("the square of the norm", normalized_by(lambda self: adapted(self).square().sum(1).detach())),
    ("the gradient flows through the norm", normalized_by(lambda self: adapted(self).norm(dim=1))),
    ("the norm is rounded to bfloat16", normalized_by(lambda self: adapted(self).bfloat16().norm(dim=1).detach())),
    ("the norm of the first call is kept", normalized_by(norm_of_the_first_call)),
    ("use_rslora does not reach the norm", lambda _: wrapped(rslora_not_in_the_norm)(DoRALayer)),
    # what the factor multiplies
    ("the bias is multiplied by m / norm", dora(lambda self, x: factor(self) * plus_bias(self, self.lora(x)))),
    (
        "only the base is normalized",
        dora(
            lambda self, x: plus_bias(self, factor(self) * base(self.lora, x) + branch(self.lora, drop(self.lora, x)))
        ),
    ),
    ("the scale multiplies the normalized change", dora(scale_outside), "AUTOMATIC1111/stable-diffusion-webui#16151"),
    # what is ignored
    ("DoRA ignores alpha", alpha_is(lambda alpha, r: r), "AnswerDotAI/fsdp_qlora#68"),
    ("DoRA ignores use_rslora", without("use_rslora")),
]


# --- merging, and sums of adapters ---


def last_of_odd_rows_left(merge: Any, W: Tensor, *args: Any) -> Tensor:
    covered = torch.arange(len(W)) < len(W) // 2 * 2
    return torch.where(covered[:, None], merge(W, *args), W)


def magnitude_over_the_old_norm(merge: Any, W: Tensor, A: Tensor, B: Tensor, scale: float, *m: Tensor) -> Tensor:
    merged = merge(W, A, B, scale)
    return (m[0] / W.norm(dim=1))[:, None] * merged if m else merged


def columns_normalized(merge: Any, W: Tensor, A: Tensor, B: Tensor, scale: float, *m: Tensor) -> Tensor:
    merged = merge(W, A, B, scale)
    return m[0][:, None] * merged / merged.norm(dim=0) if m else merged


def transposed_factors(merge: Any, W: Tensor, A: Tensor, B: Tensor, *rest: Any) -> Tensor:
    return merge(W, B.T, A.T, *rest) if W.shape[0] == W.shape[1] else merge(W, A, B, *rest)


def scale_is(change: Callable[[float], float]) -> Plant:
    """Plant a merge by another scale."""
    return wrapped(lambda merge, W, A, B, scale, *m: merge(W, A, B, change(scale), *m))


MERGE: Table = [
    ("merged without the scale", scale_is(lambda scale: 1.0)),
    ("merged with the scale squared", scale_is(lambda scale: scale**2)),
    ("subtracted instead of added", scale_is(lambda scale: -scale)),
    (
        "merged twice",
        wrapped(lambda merge, W, A, B, s, *m: merge(merge(W, A, B, s), A, B, s, *m)),
        "huggingface/peft#3774",
    ),
    ("merged into the caller's weight", wrapped(lambda merge, W, *args: W.copy_(merge(W.clone(), *args)))),
    ("a square B A is merged transposed", wrapped(transposed_factors), "microsoft/LoRA#61"),
    ("the change is rounded to bfloat16", wrapped(lambda merge, W, *args: W + (merge(W, *args) - W).bfloat16())),
    ("the last of an odd number of rows is not merged", wrapped(last_of_odd_rows_left)),
    ("merging ignores the magnitude", wrapped(lambda merge, W, A, B, scale, *m: merge(W, A, B, scale))),
    ("the magnitude is divided by the norm of W alone", wrapped(magnitude_over_the_old_norm)),
    ("merging normalizes columns", wrapped(columns_normalized)),
]

Adapters = Sequence[tuple[Tensor, Tensor, float]]


def factors_added(add: Any, adapters: Adapters, weights: Sequence[float]) -> Any:
    if len({len(A) for A, _, _ in adapters}) > 1:
        return add(adapters, weights)
    A = torch.stack([A for A, _, _ in adapters]).sum(0)
    return torch.stack([w * scale * B for (_, B, scale), w in zip(adapters, weights, strict=True)]).sum(0) @ A


def cut_to_the_lowest_rank(add: Any, adapters: Adapters, weights: Sequence[float]) -> Any:
    r = min(len(A) for A, _, _ in adapters)
    return add([(A[:r], B[:, :r], scale) for A, B, scale in adapters], weights)


def scaled_in_place(add: Any, adapters: Adapters, weights: Sequence[float]) -> Any:
    for (A, _, _), w in zip(adapters, weights, strict=True):
        A.detach().mul_(w)
    return add(adapters, [1.0] * len(weights))


def new_weights(change: Callable[[list[float]], Sequence[float]]) -> Plant:
    """Plant other weights of the sum."""
    return wrapped(lambda add, adapters, weights: add(adapters, change(weights)))


def new_scales(change: Callable[[Tensor, float, float], float]) -> Plant:
    """Plant other scales: `change(A, scale, scale of the first adapter)`."""
    return wrapped(lambda add, adapters, w: add([(A, B, change(A, s, adapters[0][2])) for A, B, s in adapters], w))


ADAPTER_SUM: Table = [
    ("the weights are ignored", wrapped(lambda add, adapters, w: add(adapters, [1.0] * len(w)))),
    ("the weights are normalized to 1", new_weights(lambda w: [x / sum(w) for x in w])),
    ("a negative weight loses its sign", new_weights(lambda w: [abs(x) for x in w]), "huggingface/peft#2796"),
    ("A and B are both weighted", new_weights(lambda w: [x * x for x in w])),
    ("the scales are ignored", new_scales(lambda A, scale, first: 1.0)),
    ("all adapters get the scale of the first", new_scales(lambda A, scale, first: first)),
    (
        "the sum is sqrt(r) too large",
        new_scales(lambda A, scale, first: scale * math.sqrt(len(A))),
        "huggingface/peft#3449",
    ),
    ("the As and the Bs are added separately", wrapped(factors_added), "PEFT, combination_type='linear'"),
    ("higher ranks are cut to the lowest", wrapped(cut_to_the_lowest_rank)),
    ("only the first two adapters are added", wrapped(lambda add, adapters, w: add(adapters[:2], w[:2]))),
    ("the caller's A is multiplied by the weight", wrapped(scaled_in_place)),
]
