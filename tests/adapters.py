"""Layers of every base with every kind of adapter, as tests draw them, and the same once more by loops."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from minilora import LoraConfig
from minilora.adapters.build import factor_shapes, low_rank_layer
from minilora.adapters.layers import LoraConv1D, LoraEmbedding, LowRankWrapper
from minilora.lora import LoraLinear
from minilora.nf4 import NF4Linear
from minilora.testing import reference
from tests.models import fill_, randn, scales, seeds, token_ids

LAYERS = ("linear", "nf4", "nf4 double", "Conv1D", "embedding")


class Conv1D(nn.Module):
    """x W + b with W stored as (in, out), as transformers' class of this name, whose numbers it would hold."""

    def __init__(self, out: int, inner: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(inner, out)), nn.Parameter(torch.empty(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


Conv1D.__module__ = "transformers.pytorch_utils"  # by which it is known


class Place(NamedTuple):
    """A layer without adapters yet, PyTorch's own layer for what will be merged, and an input."""

    layer: LowRankWrapper
    plain: nn.Module
    x: Tensor

    def applied(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What PyTorch's layer makes of x with these numbers."""
        numbers = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return functional_call(self.plain, numbers, self.x)


def place(
    kind: str,
    seed: int,
    inner: int = 6,
    outer: int = 4,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Place:
    """`options` are PyTorch's."""
    if kind == "Conv1D":
        base = filled(Conv1D(outer, inner), seed, dtype)
        return Place(LoraConv1D(base, "layer", {}), Conv1D(outer, inner), randn(seed + 50, 2, 3, inner, dtype=dtype))
    if kind == "embedding":
        base = filled(nn.Embedding(inner, outer, **options), seed, dtype)
        plain = nn.Embedding(inner, outer, **options)
        return Place(LoraEmbedding(base, "layer", {}), plain, token_ids(seed, 3, 5, high=inner))
    base = filled(nn.Linear(inner, outer, bias), seed, dtype)
    if kind != "linear":
        base = NF4Linear.quantize(base.weight, base.bias, double_quant=kind == "nf4 double")
    plain = nn.Linear(inner, outer, bias)
    return Place(LoraLinear(base, "layer", {}), plain, randn(seed + 50, 2, 3, inner, dtype=dtype))


def many_kinds(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """An embedding, linears and a Conv1D."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), Conv1D(7, 6), nn.Linear(7, 5)).to(dtype)
    fill_(model, 0)
    return model


def filled(module: nn.Module, seed: int, dtype: torch.dtype) -> nn.Module:
    module = module.to(dtype).requires_grad_(False)
    fill_(module, seed)
    return module


def add(
    layer: LowRankWrapper,
    name: str,
    seed: int,
    r: int,
    scale: float,
    use_dora: bool = False,
    has_start: bool = False,
    lora_bias: bool = False,
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Give a layer an adapter of random numbers, and let it act after those that it has; what cannot be, is not."""
    shape_A, shape_B = factor_shapes(layer.base, r)
    tensors = {"lora_A": randn(seed + 1, *shape_A), "lora_B": randn(seed + 2, *shape_B)}
    if has_start:
        tensors |= {"start_A": randn(seed + 3, *shape_A), "start_B": randn(seed + 4, *shape_B)}
    if use_dora:
        tensors["magnitude"] = randn(seed + 5, shape_B[0])
    if lora_bias and not use_dora and not isinstance(layer, LoraEmbedding):
        tensors["lora_bias"] = randn(seed + 6, shape_B[0])
    if bias and layer.base._parameters.get("bias") is not None:
        tensors["bias"] = randn(seed + 7, shape_B[0])
    config = LoraConfig(r=r, lora_alpha=scale * r, use_dora=use_dora)
    add_built(layer, name, config, {key: tensor.to(dtype) for key, tensor in tensors.items()})
    layer.active = (*layer.active, name)


def bias_of(layer: LowRankWrapper) -> Tensor | None:
    """The bias of the merged layer; an embedding has none."""
    return None if isinstance(layer, LoraEmbedding) else layer.bias


def add_built(layer: LowRankWrapper, name: str, config: LoraConfig, tensors: dict[str, Tensor]) -> None:
    """Give a layer an adapter of these tensors, as `attach` and `load_adapter` do; it does not act yet."""
    layer.add(name, low_rank_layer(layer.base, layer.path, config, name, tensors).adapters[name])


sizes = st.integers(1, 4)


@st.composite
def places(draw: Any, kinds: tuple[str, ...] = LAYERS) -> Place:
    """A base of any kind, in float64."""
    kind, seed = draw(st.sampled_from(kinds)), draw(seeds)
    inner = draw(sizes) + (kind == "embedding")
    return place(kind, seed, inner, draw(sizes), draw(st.booleans()))


@st.composite
def adapted(draw: Any, kinds: tuple[str, ...] = LAYERS) -> Place:
    """Such a base with one to three active adapters, each LoRA or DoRA, with or without a start and biases."""
    found = draw(places(kinds))
    number = draw(st.integers(1, 3))
    biased = draw(st.integers(0, 3))  # the one that trains the base's bias, if it is there
    for i in range(number):
        flags = {name: draw(st.booleans()) for name in ("use_dora", "has_start", "lora_bias")}
        add(found.layer, f"adapter{i}", draw(seeds), draw(sizes), draw(scales), bias=i == biased, **flags)
    return found


def merged_by_loops(layer: LowRankWrapper) -> tuple[reference.Array, reference.Array | None]:
    """W (out, in) and b with all active adapters, one after the other and number by number."""
    weight = matrix = _matrix(layer, layer.base.weight)
    bias = _array(layer.base._parameters.get("bias"))
    adapters = [layer.adapters[name] for name in layer.active]
    for adapter in adapters:
        bias = bias if adapter.bias is None else _array(adapter.bias)
    for adapter in adapters:
        pairs = [(adapter.lora_A, adapter.lora_B, adapter.scale)]
        if hasattr(adapter, "start_A"):
            trained = adapter.trained["lora_A"], adapter.trained["lora_B"]
            pairs = [(*trained, adapter.scale), (adapter.start_A, adapter.start_B, -adapter.scale)]
        left, own = matrix, weight
        for lora_A, lora_B, scale in pairs:
            factors = _array(lora_A), _array(lora_B)
            left, own = (reference.lora_merged_weight(each, *factors, scale) for each in (left, own))
        is_dora = adapter.magnitude is not None
        matrix = dora_stretched(left, own, _array(adapter.magnitude)) if is_dora else left
        if adapter.lora_bias is not None:
            added = adapter.scale * _array(adapter.lora_bias)
            bias = added if bias is None else bias + added
    return matrix, bias


def dora_stretched(left: reference.Array, own: reference.Array, magnitude: reference.Array) -> reference.Array:
    """m[o]·L[o] / ‖V[o]‖ by row [DoRA eq. 5]: V = W + s·B A is `own`; L, after other adapters, what those left of W."""
    rows = zip(magnitude, left, own, strict=True)
    return np.array([m * row / math.sqrt(math.fsum(v * v)) for m, row, v in rows]).reshape(left.shape)


def applied_by_loops(layer: LowRankWrapper, x: Tensor) -> reference.Array:
    """y of all active adapters."""
    matrix, bias = merged_by_loops(layer)
    if isinstance(layer, LoraEmbedding):
        return np.array([matrix[:, index] for index in x.flatten().tolist()]).reshape(*x.shape, -1)
    rows = x.double().reshape(-1, x.size(-1)).numpy()
    y = np.array([[np.dot(weights, row) for weights in matrix] for row in rows]).reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def _matrix(layer: LowRankWrapper, weight: Tensor) -> reference.Array:
    array = _array(weight)
    return array.T if isinstance(layer, LoraConv1D | LoraEmbedding) else array


def _array(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().double().numpy()
