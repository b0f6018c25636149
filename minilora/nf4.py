"""NF4: a frozen 4-bit weight, with one scale for each block of 64 numbers.

    absmax_b = max |w| over block b,    code = nearest of 16 levels to w / absmax_b
    w ≈ level[code] · absmax_b

Weights are nearly normal, so the levels are quantiles of a normal distribution, scaled to [-1, 1]
and with an exact 0  [QLoRA §3, app. E]. An absmax in float32 costs half a bit for each of its 64
weights. *Double quantization* stores the absmaxes, less their mean, in eight bits, with one float32
scale per 256: 8/64 + 32/(64·256) = 0.127 bits a weight.

QLoRA is LoRA on such a weight, computed in 16 bits  [QLoRA eq. 5].
Bytes are those of bitsandbytes: the first of two weights is in the high half of a byte, blocks run
over the rows laid end to end, and a number midway between two levels gets the lower one.

    in, out  features    n = out·in weights    b = ⌈n/64⌉ blocks

    [QLoRA]  Dettmers et al. 2023, QLoRA: Efficient Finetuning of Quantized LLMs
    [8-bit]  Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.definition import cached_on_device, definition
from minilora.errors import TrainingError

LEVELS = (  # as published; recomputed, their last bits would vary
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
BLOCK_SIZE = 64  # weights that share an absmax
NESTED_BLOCK_SIZE = 256  # absmaxes that share a scale
SMALLEST = 1e-38  # the least divisor: a block with an absmax of 0 has only zeros to divide


class Packed(NamedTuple):
    """The tensors of a 4-bit weight."""

    packed: Tensor  # (⌈n/2⌉) uint8
    absmax: Tensor  # (b) float32, or with double quantization uint8 codes
    scales: Tensor | None  # (⌈b/256⌉), of the codes
    offset: Tensor | None  # (1), likewise


@dataclass(frozen=True)
class Layout:
    """What the tensors of a packed weight stand for."""

    shape: tuple[int, int]  # (out, in)
    dtype: torch.dtype  # of the weight before quantization
    block_size: int = BLOCK_SIZE
    levels: tuple[float, ...] = LEVELS


def quantize_weight(weight: Tensor, double_quant: bool = True) -> Packed:
    """Quantize a weight (out, in), and with `double_quant` its absmaxes too."""
    packed, absmax = quantize(weight)
    if not double_quant:
        return Packed(packed, absmax, None, None)
    return Packed(packed, *quantize_absmax(absmax))


def dequantize_weight(parts: Packed, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Dequantize a packed weight: (out, in), in `dtype`."""
    packed, absmax, scales, offset = parts
    if scales is not None and offset is not None:
        absmax = dequantize_absmax(absmax, scales, offset)
    return dequantize(packed, absmax, layout.shape, dtype, layout.block_size, layout.levels)


@definition
def quantize(weight: Tensor, block_size: int = BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    """Round each number of a weight to the nearest level of its block.

    code = number of midpoints of levels below w · (1/absmax_b)

    As in bitsandbytes, an incomplete last block is divided by absmax (at least SMALLEST), others
    are multiplied by 1/absmax. If n is odd, the code of 0 fills the last byte.

    Shapes: weight (out, in) -> packed (⌈n/2⌉) uint8, absmax (b) float32
    """
    n = weight.numel()
    blocks = F.pad(weight.detach().reshape(-1).float(), (0, -n % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1)
    if not (absmax.is_meta or absmax.isfinite().all()):
        raise TrainingError("a weight that is not finite cannot be quantized")
    x = blocks * absmax.clamp(min=SMALLEST).reciprocal().unsqueeze(1)
    if n % block_size:
        absmax[-1].clamp_(min=SMALLEST)
        x[-1] = blocks[-1] / absmax[-1]
    codes = torch.bucketize(x.view(-1)[:n], midpoints(NF4.to(x.device)), out_int32=True)
    codes = F.pad(codes.to(torch.uint8), (0, n % 2), value=LEVELS.index(0.0))
    return codes[0::2] << 4 | codes[1::2], absmax


def midpoints(levels: Tensor) -> Tensor:
    """Return the numbers midway between neighbouring levels."""
    return (levels[1:] + levels[:-1]) / 2


@definition
def dequantize(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int = BLOCK_SIZE,
    levels: tuple[float, ...] = LEVELS,
) -> Tensor:
    """Look up each number's level and multiply it by its block's absmax.

    One product in float32, rounded once to `dtype`.

    Shapes: packed (⌈n/2⌉), absmax (b) -> shape
    Dtype: dtype
    """
    n = math.prod(shape)
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).view(-1)[:n]
    level = torch.tensor(levels, dtype=torch.float32, device=packed.device)[codes.int()]
    return (level * absmax.repeat_interleave(block_size)[:n]).to(dtype).view(*shape)


def dynamic_map() -> Tensor:
    """Return the levels of the second quantization: 0, 1, ±10^(i-6)·m for i = 0 … 6  [8-bit].

    m are the midpoints of 2^i equal parts of [0.1, 1]: towards 0 there are more of the 256 levels.
    """
    levels = [torch.tensor([0, 1], dtype=torch.float32)]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        levels += [means, -means]
    return torch.cat(levels).sort().values


with torch.device("cpu"):  # whatever the default device is
    NF4 = torch.tensor(LEVELS, dtype=torch.float32)
    DYNAMIC_MAP = dynamic_map()


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the absmaxes of a weight a second time, to eight bits.

    offset = mean of absmax,    scale_c = max |absmax - offset| over 256 of them
    code = nearest of 256 levels to (absmax - offset) / scale_c

    Rounded as bitsandbytes does on the CPU, by a table of 65,536 entries, so two codes in a
    thousand are not the nearest.

    Shapes: absmax (b) -> codes (b) uint8, scales (⌈b/256⌉) float32, offset (1) float32
    """
    offset = absmax.mean().view(1)
    b = absmax.numel()
    blocks = F.pad(absmax - offset, (0, -b % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    scales = blocks.abs().amax(1)
    x = (blocks * scales.reciprocal().unsqueeze(1)).view(-1)[:b].clamp(-1, 1)
    x = x.nan_to_num(-1)  # NaN (0 · 1/0) if all equal the offset; then the code is 0
    index = ((x + 1) * 0.5 * 65535 + 0.5).to(torch.int32)
    x = index.float() * (2 / 65535) - 1
    codes = torch.bucketize(x, midpoints(DYNAMIC_MAP.to(x.device)))
    return codes.to(torch.uint8), scales, offset


def dequantize_absmax(codes: Tensor, scales: Tensor, offset: Tensor) -> Tensor:
    """Dequantize absmaxes: level[code] · scale + offset, rounded after each of the two.

    Shapes: codes (b), scales (⌈b/256⌉), offset (1) -> (b)
    """
    level = cached_on_device(DYNAMIC_MAP, codes.device)[codes.long()]
    return level * scales.repeat_interleave(NESTED_BLOCK_SIZE)[: len(codes)] + offset


@definition
def nf4_linear(x: Tensor, layer: "NF4Linear", bias: Tensor | None) -> Tensor:
    """Apply a 4-bit linear layer, with a given bias.

    y = x Wᵀ + b,  W = dequantize(packed, absmax, …)

    Autograd keeps the dense W of every layer, to compute dx = dy W; the kernel dequantizes W a
    second time instead.

    Shapes: x (..., in), bias (out) -> (..., out)
    """
    return F.linear(x, layer.weight, None if bias is None else bias.to(x.dtype))


class NF4Linear(nn.Module):
    """A frozen linear layer with a packed 4-bit weight; it computes in `dtype`."""

    packed: Tensor
    absmax: Tensor
    scales: Tensor | None
    offset: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, parts: Packed, layout: Layout, bias: Tensor | None):
        super().__init__()
        self.layout = layout
        self.dtype = layout.dtype
        self.out_features, self.in_features = layout.shape
        for name, tensor in {**parts._asdict(), "bias": bias}.items():
            frozen = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            self.register_parameter(name, frozen)

    @classmethod
    def quantize(
        cls, weight: Tensor, bias: Tensor | None = None, double_quant: bool = True
    ) -> "NF4Linear":
        """Build the layer of a dense weight (out, in). It computes in the weight's dtype."""
        layout = Layout((weight.size(0), weight.size(1)), weight.dtype)
        return cls(quantize_weight(weight, double_quant), layout, bias)

    @property
    def parts(self) -> Packed:
        """The packed weight."""
        return Packed(self.packed, self.absmax, self.scales, self.offset)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), dequantized anew each time."""
        return dequantize_weight(self.parts, self.layout, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nf4_linear(x.to(self.dtype), self, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Linear":
        """Apply `.to()` and the like; a new dtype changes only the dtype of the computation."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or tensor is self.bias:
                return moved
            return tensor.to(moved.device)

        return super()._apply(move, recurse)
