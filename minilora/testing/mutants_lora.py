"""Planted mistakes in LoRA layers, and what they are planted with.

Many wrap any correct callable and change what goes in or comes out. Where that cannot make the mistake, the callable is
ignored, and a layer of `implementations.py` computes a wrong formula.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.testing.implementations import LoRALayer

Plant = Callable[[Any], Any]  # takes a correct callable and returns one with a mistake
Table = list[tuple[str, Plant] | tuple[str, Plant, str]]  # name, plant, where it was seen


class Around(nn.Module):
    """A layer that computes `rule(layer, x)` instead of `layer(x)` and has the parameters and mode of `layer`."""

    def __init__(self, layer: Any, rule: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.layer, self.rule = layer, rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self.layer, x)


def wrapped(change: Callable[..., Any]) -> Plant:
    """Plant `change(correct, *arguments)`; it has the signature of `correct`, so the same options are passed to it."""

    def plant(correct: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(correct, updated=())(functools.partial(change, correct))

    return plant


def around(rule: Callable[[Any, Tensor], Tensor]) -> Plant:
    """Plant `rule(layer, x)` around any correct layer."""
    return wrapped(lambda make, *args, **o: Around(make(*args, **o), rule))


def given(change: Callable[..., tuple[Any, ...]]) -> Plant:
    """Plant other arguments: `change(W, b, A, B, alpha)` returns those that a correct `make_layer` is given."""
    return wrapped(lambda make, *args, **o: make(*change(*args), **o))


def alpha_is(change: Callable[[float, int], float]) -> Plant:
    """Plant another alpha: `change(alpha, r)`."""
    return given(lambda W, b, A, B, alpha: (W, b, A, B, change(alpha, len(A))))


def without(option: str) -> Plant:
    """Plant that an option is ignored."""
    return wrapped(lambda make, *args, **o: make(*args, **{name: o[name] for name in o if name != option}))


def lora(rule: Callable[[LoRALayer, Tensor], Tensor]) -> Plant:
    """Plant a formula of a LoRALayer's tensors in place of the correct layer."""
    return lambda _: around(rule)(LoRALayer)


def gradient_times(factor: Any, tensor: Tensor) -> Tensor:
    """Return the tensor itself, whose gradient will be multiplied by a factor."""
    return tensor.detach() + factor * (tensor - tensor.detach())


# --- LoRA ---


def base(self: LoRALayer, x: Tensor) -> Tensor:
    return F.linear(x, self.W, self.b)


def branch(self: LoRALayer, x: Tensor, A: Tensor | None = None, B: Tensor | None = None) -> Tensor:
    """Return s·(x Aᵀ) Bᵀ, with other factors if they are given."""
    return self.scale * F.linear(F.linear(x, self.A if A is None else A), self.B if B is None else B)


def drop(self: LoRALayer, x: Tensor) -> Tensor:
    return F.dropout(x, self.p, self.training)


def plain(self: LoRALayer, x: Tensor) -> Tensor:
    return base(self, x) + branch(self, x)


def adapter(rule: Callable[[LoRALayer, Tensor], Tensor]) -> Plant:
    """Plant a layer whose adapter adds `rule(layer, dropped x)`."""
    return lora(lambda self, x: base(self, x) + rule(self, drop(self, x)))


def scale_of(A: Tensor, alpha: float, use_rslora: bool = False, **_: Any) -> float:
    return alpha / (math.sqrt(len(A)) if use_rslora else len(A))


def transposed_if_square(W: Tensor) -> Tensor:
    return W.T if W.shape[0] == W.shape[1] else W


def always_rslora(make: Any, W: Tensor, b: Any, A: Tensor, B: Tensor, alpha: float, **o: Any) -> Any:
    return make(W, b, A, B, alpha if o.get("use_rslora") else alpha * math.sqrt(len(A)), **o)


def probability_to_keep(make: Any, *args: Any, **o: Any) -> Any:
    if o.get("dropout"):
        o["dropout"] = 1 - o["dropout"]
    return make(*args, **o)


def dropout_off_for_good(self: LoRALayer, x: Tensor) -> Tensor:
    self.p = self.p if self.training else 0.0
    return self(x)


def whole_tiles_of_4_rows(self: LoRALayer, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    covered = torch.arange(len(rows)) < len(rows) // 4 * 4
    return branch(self, (rows * covered[:, None]).view_as(x))


def in_bfloat16(self: LoRALayer, x: Tensor) -> Tensor:
    h = F.linear(x.bfloat16(), self.A.bfloat16())
    return (self.scale * F.linear(h, self.B.bfloat16())).to(x.dtype)


def base_is_trained(make: Any, W: Tensor, *args: Any, **o: Any) -> Around:
    weight = nn.Parameter(W.detach().clone())
    layer = Around(make(W, *args, **o), lambda self, x: self(x) + F.linear(x, weight - weight.detach()))
    layer.register_parameter("weight", weight)
    return layer


def merged_into_the_callers_weight(make: Any, W: Tensor, b: Any, A: Tensor, B: Tensor, alpha: float, **o: Any) -> Any:
    layer = make(W.clone(), b, A, B, alpha, **o)
    W.detach().add_(scale_of(A, alpha, **o) * B.detach() @ A.detach())
    return layer


def merged_in_the_first_evaluation(self: LoRALayer, x: Tensor) -> Tensor:
    if self.training:
        return self(x)
    if "merged" not in dict(self.named_buffers()):
        self.register_buffer("merged", (self.W + self.scale * self.B @ self.A).detach())
    return F.linear(x, self.get_buffer("merged"), self.b)


class MergedAgain(nn.Module):
    """A layer that adds the adapter to the weight whenever it is set to evaluation, merged already or not."""

    def __init__(self, layer: LoRALayer):
        super().__init__()
        self.layer = layer

    def train(self, mode: bool = True) -> MergedAgain:
        sign = 1 if not mode else 0 if self.training else -1
        self.layer.W = (self.layer.W + sign * self.layer.scale * self.layer.B @ self.layer.A).detach()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.training else base(self.layer, x)


LORA: Table = [
    # the scale
    ("alpha * r instead of alpha / r", alpha_is(lambda alpha, r: alpha * r * r)),
    ("alpha instead of alpha / r", alpha_is(lambda alpha, r: alpha * r), "Blaizzy/mlx-vlm#845"),
    ("alpha is ignored", alpha_is(lambda alpha, r: r)),
    ("the scale is applied twice", alpha_is(lambda alpha, r: alpha * alpha / r)),
    ("alpha // r instead of alpha / r", alpha_is(lambda alpha, r: alpha // r * r)),
    ("use_rslora is ignored", without("use_rslora"), "NVIDIA/TensorRT-LLM#1668"),
    ("alpha / sqrt(r) without use_rslora", wrapped(always_rslora)),
    # dropout
    ("dropout is never applied", without("dropout"), "meta-pytorch/torchtune#996"),
    (
        "dropout in evaluation, too",
        lora(lambda self, x: base(self, x) + branch(self, F.dropout(x, self.p))),
        "karpathy/nanoGPT#240",
    ),
    ("dropout on the input of the base, too", lora(lambda self, x: plain(self, drop(self, x)))),
    (
        "dropout without the factor 1 / (1 - p)",
        adapter(lambda self, x: branch(self, x) * (1 - self.p if self.training else 1)),
    ),
    (
        "the adapter is multiplied by 1 - p in evaluation",
        adapter(lambda self, x: branch(self, x) * (1 if self.training else 1 - self.p)),
        "ooples/AiDotNet#256",
    ),
    ("p is the probability to keep", wrapped(probability_to_keep)),
    (
        "one dropout mask for all rows",
        lora(lambda self, x: base(self, x) + branch(self, x * drop(self, x.new_ones(x.shape[-1])))),
    ),
    (
        "dropout changes the input in place",
        lora(lambda self, x: base(self, x) + branch(self, F.dropout(x, self.p, self.training, inplace=True))),
    ),
    ("dropout stays off after the first evaluation", lora(dropout_off_for_good), "NVIDIA/Megatron-LM#411"),
    # the base
    ("the bias is lost", given(lambda W, b, A, B, alpha: (W, None, A, B, alpha))),
    ("the bias is added twice", given(lambda W, b, A, B, alpha: (W, b if b is None else 2 * b, A, B, alpha))),
    ("a base without a bias fails", given(lambda W, b, A, B, alpha: (W, b.clone(), A, B, alpha))),
    ("a square weight is transposed", given(lambda W, b, A, B, alpha: (transposed_if_square(W), b, A, B, alpha))),
    ("the base weight is trained, too", wrapped(base_is_trained)),
    # the product of A and B
    ("the given B is replaced by zeros", given(lambda W, b, A, B, alpha: (W, b, A, torch.zeros_like(B), alpha))),
    (
        "A is reshaped instead of transposed",
        adapter(lambda self, x: self.scale * x @ self.A.reshape(-1, len(self.A)) @ self.B.T),
    ),
    (
        "B A is transposed when it is square",
        adapter(lambda self, x: self.scale * F.linear(x, transposed_if_square(self.B @ self.A))),
        "microsoft/LoRA#61",
    ),
    ("a ReLU between A and B", adapter(lambda self, x: self.scale * F.linear(F.linear(x, self.A).relu(), self.B))),
    ("the adapter is computed in bfloat16", adapter(in_bfloat16)),
    # only some shapes
    (
        "ranks above the number of features are ignored",
        adapter(lambda self, x: branch(self, x, self.A[: min(self.W.shape)], self.B[:, : min(self.W.shape)])),
    ),
    (
        "rows and tokens of the adapter's input are exchanged",
        adapter(lambda self, x: branch(self, x.transpose(0, 1).reshape(x.shape) if x.ndim == 3 else x)),
    ),
    ("a vector comes back as a matrix of one row", around(lambda self, x: self(torch.atleast_2d(x)))),
    ("rows past a multiple of 4 get no adapter", adapter(whole_tiles_of_4_rows)),
    # gradients
    ("A gets no gradient", adapter(lambda self, x: branch(self, x, A=self.A.detach()))),
    (
        "the gradient of B lacks the scale",
        adapter(lambda self, x: branch(self, x, B=gradient_times(1 / self.scale, self.B))),
    ),
    (
        "the gradient of A is a mean over rows",
        adapter(lambda self, x: branch(self, x, A=gradient_times(1 / x[..., 0].numel(), self.A))),
    ),
    ("the input gets no gradient from the adapter", adapter(lambda self, x: branch(self, x.detach()))),
    (
        "the input gets no gradient from the base",
        lora(lambda self, x: base(self, x.detach()) + branch(self, drop(self, x))),
    ),
    # state
    ("the adapter is merged into the caller's weight", wrapped(merged_into_the_callers_weight)),
    ("the weight merged in the first evaluation is kept", lora(merged_in_the_first_evaluation)),
    (
        "each call of eval merges again",
        lambda _: wrapped(lambda make, *args, **o: MergedAgain(make(*args, **o)))(LoRALayer),
        "Baijiong-Lin/LoRA-Torch#10",
    ),
]
