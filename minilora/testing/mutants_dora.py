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
    around,
    base,
    branch,
    drop,
    given,
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


def normalized_by(norm: Callable[[DoRALayer], Tensor]) -> Plant:
    """Plant a layer with another norm."""
    return dora(lambda self, x: plus_bias(self, self.m / norm(self) * self.lora(x)))


def factor(self: DoRALayer) -> Tensor:
    return self.m / adapted(self).norm(dim=1).detach()


def norm_of_the_first_call(self: DoRALayer) -> Tensor:
    if "norm" not in dict(self.named_buffers()):
        self.register_buffer("norm", adapted(self).norm(dim=1).detach())
    return self.get_buffer("norm")


def only_the_base_is_normalized(self: DoRALayer, x: Tensor) -> Tensor:
    return plus_bias(self, factor(self) * base(self.lora, x) + branch(self.lora, drop(self.lora, x)))


def scale_outside(self: DoRALayer, x: Tensor) -> Tensor:
    V = adapted(self, scale=1.0)
    change = (self.m / V.norm(dim=1).detach())[:, None] * V - self.lora.W
    return plus_bias(self, base(self.lora, x) + self.lora.scale * F.linear(drop(self.lora, x), change))


def gradient_of_the_magnitude_scaled(self: DoRALayer, x: Tensor) -> Tensor:
    c = factor(self)
    return plus_bias(self, (c.detach() + c.detach() * (c - c.detach())) * self.lora(x))


def starts_at_the_adapted_norm(make: Any, W: Tensor, b: Any, A: Tensor, B: Tensor, alpha: float, **o: Any) -> Any:
    o.setdefault("magnitude", (W + scale_of(A, alpha, **o) * B @ A).detach().norm(dim=1))
    return make(W, b, A, B, alpha, **o)


def rslora_not_in_the_norm(make: Any, W: Tensor, b: Any, A: Tensor, B: Tensor, alpha: float, **o: Any) -> Around:
    rule = normalized_by(lambda self: adapted(self, alpha / len(A)).norm(dim=1).detach())
    return rule(make)(W, b, A, B, alpha, **o)


DORA: Table = [
    # the magnitude
    ("DoRA is LoRA: the magnitude does nothing", "", dora(lambda self, x: plus_bias(self, self.lora(x)))),
    (
        "the magnitude is not trained",
        "meta-pytorch/torchtune#2250",
        dora(lambda self, x: plus_bias(self, factor(self).detach() * self.lora(x))),
    ),
    ("a given magnitude is ignored", "", without("magnitude")),
    ("the magnitude starts at the norm of W + s·B A", "", lambda _: wrapped(starts_at_the_adapted_norm)(DoRALayer)),
    ("m / norm is applied twice", "", dora(lambda self, x: plus_bias(self, factor(self) ** 2 * self.lora(x)))),
    (
        "the magnitude's gradient has m / norm twice",
        "axolotl-ai-cloud/axolotl#3528",
        dora(gradient_of_the_magnitude_scaled),
    ),
    # the norm
    (
        "columns are normalized instead of rows",
        "catid/dora#4, nbasyl/DoRA#1",
        dora(lambda self, x: plus_bias(self, self.m * self.lora(x / adapted(self).norm(dim=0).detach()))),
    ),
    ("the norm of W alone", "Comfy-Org/ComfyUI#15458", normalized_by(lambda self: self.lora.W.norm(dim=1))),
    ("the norm lacks the scale", "", normalized_by(lambda self: adapted(self, 1.0).norm(dim=1).detach())),
    ("one norm for the whole matrix", "", normalized_by(lambda self: adapted(self).norm().detach())),
    ("the square of the norm", "", normalized_by(lambda self: adapted(self).square().sum(1).detach())),
    ("the gradient flows through the norm", "", normalized_by(lambda self: adapted(self).norm(dim=1))),
    ("the norm is rounded to bfloat16", "", normalized_by(lambda self: adapted(self).bfloat16().norm(dim=1).detach())),
    ("the norm of the first call is kept", "", normalized_by(norm_of_the_first_call)),
    ("use_rslora does not reach the norm", "", lambda _: wrapped(rslora_not_in_the_norm)(DoRALayer)),
    # what the factor multiplies
    (
        "the bias is multiplied by m / norm",
        "",
        dora(lambda self, x: factor(self) * plus_bias(self, self.lora(x))),
    ),
    ("only the base is normalized", "", dora(only_the_base_is_normalized)),
    ("the scale multiplies the normalized change", "AUTOMATIC1111/stable-diffusion-webui#16151", dora(scale_outside)),
    # what is ignored
    ("DoRA ignores alpha", "AnswerDotAI/fsdp_qlora#68", given(lambda W, b, A, B, alpha: (W, b, A, B, len(A)))),
    ("DoRA ignores use_rslora", "", without("use_rslora")),
]


# --- merging, and sums of adapters ---


def merged_in_place(merge: Any, W: Tensor, *args: Any) -> Tensor:
    return W.copy_(merge(W.clone(), *args))


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


MERGE: Table = [
    ("merged without the scale", "", wrapped(lambda merge, W, A, B, scale, *m: merge(W, A, B, 1.0, *m))),
    ("merged with the scale squared", "", wrapped(lambda merge, W, A, B, scale, *m: merge(W, A, B, scale**2, *m))),
    ("subtracted instead of added", "", wrapped(lambda merge, W, A, B, scale, *m: merge(W, A, B, -scale, *m))),
    (
        "merged twice",
        "huggingface/peft#3774",
        wrapped(lambda merge, W, A, B, s, *m: merge(merge(W, A, B, s), A, B, s, *m)),
    ),
    ("merged into the caller's weight", "", wrapped(merged_in_place)),
    ("a square B A is merged transposed", "microsoft/LoRA#61", wrapped(transposed_factors)),
    ("the change is rounded to bfloat16", "", wrapped(lambda merge, W, *args: W + (merge(W, *args) - W).bfloat16())),
    ("the last of an odd number of rows is not merged", "", wrapped(last_of_odd_rows_left)),
    ("merging ignores the magnitude", "", wrapped(lambda merge, W, A, B, scale, *m: merge(W, A, B, scale))),
    ("the magnitude is divided by the norm of W alone", "", wrapped(magnitude_over_the_old_norm)),
    ("merging normalizes columns", "", wrapped(columns_normalized)),
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


def new_scales(change: Callable[[Tensor, float, float], float]) -> Plant:
    """Plant other scales: `change(A, scale, scale of the first adapter)`."""
    return wrapped(lambda add, adapters, w: add([(A, B, change(A, s, adapters[0][2])) for A, B, s in adapters], w))


ADAPTER_SUM: Table = [
    ("the weights are ignored", "", wrapped(lambda add, adapters, w: add(adapters, [1.0] * len(w)))),
    ("the weights are normalized to 1", "", wrapped(lambda add, adapters, w: add(adapters, [x / sum(w) for x in w]))),
    (
        "a negative weight loses its sign",
        "huggingface/peft#2796",
        wrapped(lambda add, adapters, w: add(adapters, [abs(x) for x in w])),
    ),
    ("A and B are both weighted", "", wrapped(lambda add, adapters, w: add(adapters, [x * x for x in w]))),
    ("the scales are ignored", "", new_scales(lambda A, scale, first: 1.0)),
    ("all adapters get the scale of the first", "", new_scales(lambda A, scale, first: first)),
    (
        "the sum is sqrt(r) too large",
        "huggingface/peft#3449",
        new_scales(lambda A, scale, first: scale * math.sqrt(len(A))),
    ),
    ("the As and the Bs are added separately", "PEFT, combination_type='linear'", wrapped(factors_added)),
    ("higher ranks are cut to the lowest", "", wrapped(cut_to_the_lowest_rank)),
    ("only the first two adapters are added", "", wrapped(lambda add, adapters, w: add(adapters[:2], w[:2]))),
    ("the caller's A is multiplied by the weight", "", wrapped(scaled_in_place)),
]
