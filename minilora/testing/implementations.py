"""Correct implementations in plain PyTorch, one of each kind that can be checked, as short as a user would write them.

They share no code with the rest of minilora except two tables of levels. `catalogue` has them with mistakes, some of
which replace an argument that has a default: the `scale` of a block, the `code` of a number, the `center` of absmaxes.

    N  rows    in, out  features    r  rank    B  batch    T  tokens    D  width    V  vocabulary

References are those of `reference`, and [rsLoRA] is Kalajdzievski 2023, A Rank Stabilization Scaling Factor for
Fine-Tuning with LoRA.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.testing.reference import NF4_LEVELS, absmax_levels

LEVELS = torch.tensor(NF4_LEVELS, dtype=torch.float32)
DYNAMIC_MAP = torch.from_numpy(absmax_levels()).float()  # the 256 levels of the second quantization
SMALLEST = 1e-38  # divides a block of zeros
END = "<|end|>"


class LoRALayer(nn.Module):
    """A LoRA layer: y = x Wᵀ + s·(dropout(x) Aᵀ) Bᵀ + b, s = alpha/r or, with `use_rslora`, alpha/√r  [LoRA eq. 3].

    With `use_dora` the sum in front of b is multiplied by m/‖W + s·B A‖, each row's norm constant  [DoRA §4.3].
    """

    W: Tensor
    m: Any  # a parameter, with DoRA

    def __init__(
        self,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        magnitude: Tensor | None = None,
    ):
        super().__init__()
        self.register_buffer("W", W)
        self.b = b
        self.A, self.B = nn.Parameter(A.detach().clone()), nn.Parameter(B.detach().clone())
        self.scale = alpha / (math.sqrt(len(A)) if use_rslora else len(A))
        self.p = dropout
        start = W.norm(dim=1) if magnitude is None else magnitude
        self.m = nn.Parameter(start.detach().clone()) if use_dora else None

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.p, self.training)
        y = F.linear(x, self.W) + self.scale * F.linear(F.linear(dropped, self.A), self.B)
        if self.m is not None:
            y = self.m / merge(self.W, self.A, self.B, self.scale).norm(dim=1).detach() * y
        return y if self.b is None else y + self.b


def merge(W: Tensor, A: Tensor, B: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """Return W' = W + s·B A or, with a magnitude, m ⊙ W'/‖W'‖ by row."""
    merged = W + scale * B @ A
    return merged if magnitude is None else (magnitude / merged.norm(dim=1))[:, None] * merged


def add_adapters(adapters: Sequence[tuple[Tensor, Tensor, float]], weights: Sequence[float]) -> Tensor:
    """Return ΔW = Σᵢ wᵢ·sᵢ·Bᵢ Aᵢ."""
    return torch.stack([w * scale * B @ A for (A, B, scale), w in zip(adapters, weights, strict=True)]).sum(0)


def largest(blocks: Tensor) -> Tensor:
    """Return the largest |number| of each block."""
    return blocks.abs().amax(1)


def nearest_code(scaled: Tensor, levels: Tensor) -> Tensor:
    """Return the code of the nearest level: how many midpoints of neighbouring levels are below."""
    return torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)


def blockwise(
    numbers: Tensor, block_size: int, levels: Tensor, scale: Any = largest, code: Any = nearest_code
) -> tuple[Tensor, Tensor]:
    """Quantize each number, divided by the scale of its block: numbers (n) -> codes (n), scales (⌈n/block_size⌉)."""
    blocks = F.pad(numbers, (0, -len(numbers) % block_size)).view(-1, block_size)
    scales = scale(blocks)
    codes = code(blocks / scales.clamp(min=SMALLEST)[:, None], levels)
    return codes.flatten()[: len(numbers)], scales


def nf4_quantize(W: Tensor, block_size: int, scale: Any = largest, code: Any = nearest_code) -> tuple[Tensor, Tensor]:
    """Quantize a weight to the nearest of the 16 levels of NF4, relative to the absmax of its block  [QLoRA §3].

    Shapes: W (out, in) -> packed (⌈n/2⌉) uint8, absmax (⌈n/block⌉) float32
    """
    codes, absmax = blockwise(W.detach().float().flatten(), block_size, LEVELS, scale, code)
    return pack(codes), absmax


def pack(codes: Tensor) -> Tensor:
    """Put two codes in a byte, the first in the high half; the code of 0 fills the last byte."""
    codes = F.pad(codes, (0, len(codes) % 2), value=NF4_LEVELS.index(0.0)).to(torch.uint8)
    return codes[::2] << 4 | codes[1::2]


def unpack(packed: Tensor) -> Tensor:
    """Return the codes in all halves of bytes, in order."""
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten().int()


def nf4_dequantize(packed: Tensor, absmax: Tensor, shape: Sequence[int], block_size: int) -> Tensor:
    """Return w = level[code] · absmax_b."""
    levels = LEVELS[unpack(packed)[: math.prod(shape)]]
    return (levels * absmax.repeat_interleave(block_size)[: len(levels)]).view(*shape)


def double_quantize(absmax: Tensor, scale: Any = largest, center: Any = torch.mean) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize absmaxes to 8 bits.

    offset = mean,    scale = max |absmax - offset| of 256,    code = level nearest to (absmax - offset) / scale

    Shapes: absmax (b) -> codes (b) uint8, scales (⌈b/256⌉), offset ()
    """
    offset = center(absmax)
    codes, scales = blockwise(absmax - offset, 256, DYNAMIC_MAP, scale)
    return codes.to(torch.uint8), scales, offset


def double_dequantize(codes: Tensor, scales: Tensor, offset: Tensor) -> Tensor:
    """Return absmax = level[code] · scale + offset."""
    return DYNAMIC_MAP[codes.int()] * scales.repeat_interleave(256)[: len(codes)] + offset


class Linear4bit(nn.Module):
    """A 4-bit linear layer: y = x Wᵀ + b, where W is stored as NF4 in blocks of 64 and dequantized in each call."""

    def __init__(self, W: Tensor, b: Tensor | None, double_quant: bool = False):
        super().__init__()
        self.packed, absmax = nf4_quantize(W, 64)
        self.absmax = double_dequantize(*double_quantize(absmax)) if double_quant else absmax
        self.shape, self.b = W.shape, b

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, nf4_dequantize(self.packed, self.absmax, self.shape, 64).to(x.dtype), self.b)


def masked_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of -log p(labels[t+1]) under logits[t] over all labelled tokens."""
    return loss_sum(logits, labels) / (labels[:, 1:] != -100).sum()


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of which `masked_loss` is the mean."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def accumulated_gradient(W: Tensor, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return d/dW of the mean loss over all labels of all micro-batches, where logits = x Wᵀ."""
    leaf = W.detach().clone().requires_grad_()
    count = sum((labels[:, 1:] != -100).sum() for _, labels in micro_batches)
    for x, labels in micro_batches:
        (loss_sum(F.linear(x, leaf), labels) / count).backward()
    assert leaf.grad is not None
    return leaf.grad


def render_chat(messages: Sequence[Mapping[str, str]]) -> tuple[list[str], list[bool]]:
    """Render <|role|>, the words and spaces, and <|end|> for each message; a reply and its end are labelled."""
    tokens, is_label = [], []
    for message in messages:
        content = [*re.findall(r"\s+|\S+", message["content"]), END]
        tokens += [f"<|{message['role']}|>", *content]
        is_label += [False, *[message["role"] == "assistant"] * len(content)]
    return tokens, is_label
