"""The catalogue of mistakes: for each kind of implementation, wrong ones by what is wrong with them.

Each is one of `implementations.py` with a mistake, and is called like it; those of NF4 and of double quantization are
pairs (quantize, dequantize), those of layers are in `layer_mistakes`. A check that fails runs those of its kind on the
cases that fail, and names the mistake that has the same result. The threads and libraries in comments are those where
a mistake was seen. Every check refuses them all:

    >>> import torch
    >>> W, A, B = torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1)
    >>> CATALOGUE["merge"]["the scale is missing"](W, A, B, 0.5).item()
    1.0
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.testing.implementations import (
    Linear4bit,
    accumulated_gradient,
    double_dequantize,
    double_quantize,
    loss_sum,
    masked_loss,
    nf4_dequantize,
    nf4_quantize,
    render_chat,
    unpack,
)
from minilora.testing.layer_mistakes import LAYERS, Make
from minilora.testing.reference import IGNORED

Pair = tuple[Make, Make]  # quantize, dequantize
CATALOGUE: dict[str, Mapping[str, Any]] = {**LAYERS}

# --- NF4 ---

FP4_LEVELS = torch.tensor([s * level / 12 for s in (1, -1) for level in (0, 0.0625, 8, 12, 4, 6, 2, 3)])


def exchanged(packed: Tensor, *rest: Any) -> tuple[Any, ...]:
    return packed << 4 | packed >> 4, *rest


def dequantize_low_half_first(*quantized: Any) -> Tensor:
    return nf4_dequantize(*exchanged(*quantized))


def dequantize_fp4(packed: Tensor, absmax: Tensor, shape: Sequence[int], block_size: int) -> Tensor:
    scale = nf4_dequantize(torch.full_like(packed, 255), absmax, shape, block_size)
    return FP4_LEVELS[unpack(packed)[: scale.numel()]].view(*shape) * scale


def dequantize_whole_blocks(packed: Tensor, absmax: Tensor, shape: Sequence[int], block_size: int) -> Tensor:
    levels = nf4_dequantize(packed, torch.ones(1), shape, 2 * len(packed))
    row, column = torch.arange(shape[0])[:, None], torch.arange(shape[1])
    block = row * (shape[1] // block_size) + column // block_size
    return levels * absmax[block.clamp(max=len(absmax) - 1)]


def pair(quantize: Make = nf4_quantize, dequantize: Make = nf4_dequantize, **changes: Any) -> Pair:
    """Return a pair of which one function is another, or which has another `scale` of a block or `code` of a number."""
    return partial(quantize, **changes), dequantize


CATALOGUE["nf4"] = {
    "the two codes of a byte are exchanged": pair(lambda *W: exchanged(*nf4_quantize(*W)), dequantize_low_half_first),
    "dequantize takes the low half of a byte first": pair(dequantize=dequantize_low_half_first),
    "the levels are those of FP4": pair(
        code=lambda scaled, levels: (scaled[..., None] - FP4_LEVELS).abs().argmin(-1), dequantize=dequantize_fp4
    ),
    "codes are rounded down": pair(code=lambda scaled, levels: torch.bucketize(scaled, levels, right=True) - 1),
    "a tie gets the upper level": pair(
        code=lambda scaled, levels: torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2, right=True)
    ),
    "the absmax is the largest w instead of the largest |w|": pair(scale=lambda blocks: blocks.amax(1)),
    "the absmaxes are rounded to bfloat16": pair(scale=lambda blocks: blocks.abs().amax(1).bfloat16().float()),
    "each row is taken for ⌊in/block_size⌋ whole blocks": pair(dequantize=dequantize_whole_blocks),  # bitsandbytes
}

# --- double quantization ---

double = partial(pair, quantize=double_quantize, dequantize=double_dequantize)
CATALOGUE["double_quant"] = {
    "the offset is 0 instead of the mean": double(center=lambda absmax: absmax.new_zeros(())),
    "the offset is not added": double(dequantize=lambda codes, scales, o: double_dequantize(codes, scales, 0 * o)),
    "the scale is the largest absmax - offset, without its absolute value": double(scale=lambda blocks: blocks.amax(1)),
    "one scale is used for all absmaxes": double(scale=lambda blocks: blocks.abs().max().expand(len(blocks))),
}

# --- the 4-bit linear ---

CATALOGUE["linear4bit"] = {
    "the bias is missing": lambda W, b, double_quant=False: Linear4bit(W, None, double_quant),
    "the weight is not quantized": lambda W, b: lambda x: F.linear(x, W, b),
}

# --- the masked loss, of logits z and labels ---


def count(labels: Tensor) -> Tensor:
    """Return how many labels are predicted: that of a row's first token is not."""
    return (labels[:, 1:] != IGNORED).sum()


CATALOGUE["loss_masking"] = {
    "logits at t are compared with the label at t": lambda z, labels: F.cross_entropy(z.mT, labels),
    "logits at t < T are compared with the label at t": lambda z, labels: masked_loss(z, labels.roll(1, 1)),
    "the last label of each row is left out": lambda z, labels: masked_loss(z[:, :-1], labels[:, :-1]),
    "the last position of a row predicts the first label of the next": lambda z, labels: masked_loss(
        z.flatten(0, 1)[None], labels.flatten()[None]
    ),
    "positions without a label are learned as token 0": lambda z, labels: masked_loss(z, labels.clamp(min=0)),
    "token 0 is taken for padding": lambda z, labels: masked_loss(  # NVIDIA-NeMo/Megatron-Bridge#4660
        z, labels.masked_fill(labels == 0, IGNORED)
    ),
    "the sum is not divided": loss_sum,
    "the sum is divided by all predictions": lambda z, labels: loss_sum(z, labels) / labels[:, 1:].numel(),
    "the labels are counted before the shift": lambda z, labels: loss_sum(z, labels) / (labels != IGNORED).sum(),
    "it is the mean of the means of the rows": lambda z, labels: torch.stack(
        [masked_loss(z[[i]], labels[[i]]) for i in range(len(labels)) if count(labels[[i]])]
    ).mean(),
}

# --- accumulation ---

Batches = Sequence[tuple[Tensor, Tensor]]


def mean_of_means(weight: Callable[[Tensor], int], W: Tensor, batches: Batches) -> Tensor:
    """Return the mean of the micro-batches' own gradients, which are 0 without labels, by a weight of their labels."""
    gradients = [weight(labels) * accumulated_gradient(W, [(x, labels)]) for x, labels in batches if count(labels)]
    return torch.stack(gradients).sum(0) / sum(weight(labels) for _, labels in batches)


def divided_by(divisor: Callable[[Batches], Any]) -> Callable[[Tensor, Batches], Tensor]:
    """Return a step that divides the sum of the losses by another number than that of the predicted labels."""
    return lambda W, batches: accumulated_gradient(W, batches) * sum(count(y) for _, y in batches) / divisor(batches)


CATALOGUE["accumulation"] = {
    "it is the mean of the means of the micro-batches": partial(  # huggingface/transformers#34191
        mean_of_means, lambda labels: 1
    ),
    "the means of the micro-batches are weighted by their rows": partial(mean_of_means, len),
    "the sum is not divided": divided_by(lambda batches: 1),
    "the labels are counted before the shift": divided_by(
        lambda batches: sum((labels != IGNORED).sum() for _, labels in batches)
    ),
    "the mean is divided by the micro-batches": lambda W, batches: accumulated_gradient(W, batches) / len(batches),
    "the gradient is that of the last micro-batch": lambda W, batches: accumulated_gradient(W, batches[-1:]),
}

# --- the chat mask: `render` is a correct one ---

Spans = list[tuple[int, int]]  # begin and end of each run of labelled tokens


def with_spans(change: Callable[[Spans], Spans]) -> Make:
    """Return a rendering that labels other spans than the correct ones."""

    def wrong(messages: Any, render: Callable[..., Any] = render_chat) -> tuple[Sequence[str], Sequence[bool]]:
        tokens, mask = render(messages)
        edges = [i for i in range(len(mask) + 1) if (i > 0 and mask[i - 1]) != (i < len(mask) and mask[i])]
        spans = change(list(zip(edges[::2], edges[1::2], strict=True)))
        return tokens, [any(begin <= i < end for begin, end in spans) for i in range(len(tokens))]

    return wrong


def moved(begins: int, ends: int) -> Make:
    """Return a rendering whose labels begin and end some tokens later than the correct ones."""
    return with_spans(lambda spans: [(begin + begins, end + ends) for begin, end in spans])


CATALOGUE["chat_mask"] = {
    "everything is learned": with_spans(lambda spans: [(0, sys.maxsize)]),
    "only the first reply is learned": with_spans(lambda spans: spans[:1]),
    "only the last reply is learned": with_spans(lambda spans: spans[-1:]),
    "the end token after a reply is not learned": moved(0, -1),  # verl-project/verl#535
    "the token in front of a reply is learned": moved(-1, 0),
    "the mask is one token early": moved(-1, -1),
    "the mask is one token late": moved(1, 1),  # zai-org/ChatGLM3#184
}
