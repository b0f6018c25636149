"""The catalogue of mistakes: for each kind of implementation, wrong ones by what is wrong with them.

Each is one of `implementations.py` with a mistake, and is called like it; those of NF4 and of double quantization are
pairs (quantize, dequantize). A check that fails runs those of its kind on the cases that fail, and names the mistake
that has the same result. The threads and libraries in comments are those where a mistake was seen. Every check refuses
them all:

    >>> import torch
    >>> W, A, B = torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1)
    >>> CATALOGUE["merge"]["the scale is missing"](W, A, B, 0.5).item()
    1.0
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.testing.implementations import (
    Linear4bit,
    LoRALayer,
    accumulated_gradient,
    add_adapters,
    double_dequantize,
    double_quantize,
    loss_sum,
    masked_loss,
    merge,
    nf4_dequantize,
    nf4_quantize,
    render_chat,
    unpack,
)
from minilora.testing.reference import IGNORED

Make = Callable[..., Any]
Pair = tuple[Make, Make]  # quantize, dequantize


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


# --- LoRA ---

lora = partial(with_formula, LoRALayer)


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


def without_masked_gradient(self: LoRALayer, x: Tensor) -> Tensor:
    update = delta(self, x)
    return base(self, x) + update + (delta(self, drop(self, x)) - update).detach()


EITHER: Mapping[str, Make] = {
    "the scale is α·r": with_scale(lambda alpha, r: alpha * r),
    "the scale is α: it is not divided by r": with_scale(lambda alpha, r: alpha),  # Blaizzy/mlx-vlm#845
    "the scale is missing": with_scale(lambda alpha, r: 1.0),
    "the update is missing": lora(base),
    "the update is added twice": with_update(lambda self, x: 2 * delta(self, drop(self, x))),
    "a square B A is transposed": with_update(  # microsoft/LoRA#61
        lambda self, x: self.scale * F.linear(x, transposed(self, self.B @ self.A))
    ),
    "a square W is transposed": with_tensor("W", transposed),
    "a square A is transposed": with_tensor("A", transposed),
    "a square B is transposed": with_tensor("B", transposed),
    "the update is computed in bfloat16": with_update(
        lambda self, x: self.scale * F.linear(F.linear(drop(self, x).bfloat16(), self.A.bfloat16()), self.B.bfloat16())
    ),
    "the bias is missing": lora(lora_sum),
    "the bias is added twice": lora(lambda self, x: plus_bias(self, self(x))),
    "the bias is multiplied by s": lora(
        lambda self, x: lora_sum(self, x) + (0 if self.b is None else self.scale * self.b)
    ),
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
    "dropout lacks the factor 1/(1 - p)": with_update(
        lambda self, x: delta(self, drop(self, x)) * (1 - self.p if self.training else 1.0)
    ),
    "one dropout mask is used for all rows": with_update(
        lambda self, x: delta(self, x * drop(self, x.new_ones(x.shape[-1])))
    ),
    "dropout is p where 1 - p was asked for": with_update(
        lambda self, x: delta(self, F.dropout(x, 1 - self.p, self.training and self.p > 0))
    ),
    "dropout is applied to the update": with_update(lambda self, x: drop(self, delta(self, x))),
    "gradients do not pass through the dropout mask": lora(without_masked_gradient),  # fms-acceleration
    "the gradient of A lacks the scale": with_tensor("A", gradient_times(lambda self: 1 / self.scale)),
    "the gradient of B lacks the scale": with_tensor("B", gradient_times(lambda self: 1 / self.scale)),
    "the gradient of A has the scale twice": with_tensor("A", gradient_times(lambda self: self.scale)),
    "the gradient of B has the scale twice": with_tensor("B", gradient_times(lambda self: self.scale)),
    "the gradient of x lacks that of the update": with_update(lambda self, x: delta(self, drop(self, x.detach()))),
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

DoRALayer = partial(LoRALayer, use_dora=True)
dora = partial(with_formula, DoRALayer)


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


DORA: Mapping[str, Make] = {
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
    "dropout is applied to (m/‖W + s·B A‖ - 1)·x Wᵀ": dora(dropout_of_the_difference),  # PEFT
    "the scale is α/r in spite of use_rslora": without_rslora(DoRALayer),
}

# --- merging, and sums of adapters ---

MERGE: Mapping[str, Make] = {
    "the scale is missing": lambda W, A, B, scale, *m: merge(W, A, B, 1.0, *m),
    "the update is added twice": lambda W, A, B, scale, *m: merge(W, A, B, 2 * scale, *m),  # huggingface/peft#3774
}
MERGE_DORA: Mapping[str, Make] = {
    **MERGE,
    "the magnitude is ignored": lambda W, A, B, scale, magnitude: merge(W, A, B, scale),
    "columns are normalized instead of rows": lambda W, A, B, s, m: m[:, None] * F.normalize(merge(W, A, B, s), dim=0),
    "the norm is that of W": lambda W, A, B, scale, m: (m / W.norm(dim=1))[:, None] * merge(W, A, B, scale),
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


def pair(
    quantize: Callable[..., Any] = nf4_quantize, dequantize: Callable[..., Any] = nf4_dequantize, **changes: Any
) -> Pair:
    """Return a pair of which one function is another, or which has another `scale` of a block or `code` of a number."""
    return partial(quantize, **changes), dequantize


NF4: Mapping[str, Pair] = {
    "the two codes of a byte are exchanged": pair(
        lambda *given: exchanged(*nf4_quantize(*given)), dequantize_low_half_first
    ),
    "dequantize takes the low half of a byte first": pair(dequantize=dequantize_low_half_first),
    "the levels are those of FP4": pair(
        code=lambda scaled, levels: (scaled[..., None] - FP4_LEVELS).abs().argmin(-1), dequantize=dequantize_fp4
    ),
    "codes are rounded down instead of to the nearest level": pair(
        code=lambda scaled, levels: torch.bucketize(scaled, levels, right=True) - 1
    ),
    "a tie gets the upper level": pair(
        code=lambda scaled, levels: torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2, right=True)
    ),
    "the absmax is the largest w instead of the largest |w|": pair(scale=lambda blocks: blocks.amax(1)),
    "the absmaxes are rounded to bfloat16": pair(scale=lambda blocks: blocks.abs().amax(1).bfloat16().float()),
    "each row is taken for ⌊in/block_size⌋ whole blocks": pair(dequantize=dequantize_whole_blocks),  # bitsandbytes
    "blocks have 64 weights, whatever block_size is": pair(lambda W, block_size: nf4_quantize(W, 64)),
}

# --- double quantization ---

double = partial(pair, quantize=double_quantize, dequantize=double_dequantize)
DOUBLE_QUANT: Mapping[str, Pair] = {
    "the offset is 0 instead of the mean": double(center=lambda absmax: absmax.new_zeros(())),
    "the offset is not added": double(
        dequantize=lambda codes, scales, offset: double_dequantize(codes, scales, 0 * offset)
    ),
    "the scale is the largest absmax - offset, without its absolute value": double(scale=lambda blocks: blocks.amax(1)),
    "one scale is used for all absmaxes": double(scale=lambda blocks: blocks.abs().max().expand(len(blocks))),
}

# --- the 4-bit linear ---


def with_whole_blocks(self: Linear4bit, x: Tensor) -> Tensor:
    W = dequantize_whole_blocks(self.packed, self.absmax, self.shape, 64)
    return F.linear(x, W.to(x.dtype), self.b)


LINEAR4BIT: Mapping[str, Callable[..., Any]] = {
    "the bias is missing": lambda W, b, double_quant=False: Linear4bit(W, None, double_quant),
    "the weight is not quantized": lambda W, b: lambda x: F.linear(x, W, b),
    "each row is taken for ⌊in/block_size⌋ whole blocks": with_formula(Linear4bit, with_whole_blocks),
    "double quantization is ignored": lambda W, b, double_quant=False: Linear4bit(W, b),
}

# --- the masked loss, of logits and labels ---


def count(labels: Tensor) -> Tensor:
    """Return how many labels are predicted: that of a row's first token is not."""
    return (labels[:, 1:] != IGNORED).sum()


def mean_of_rows(logits: Tensor, labels: Tensor) -> Tensor:
    rows = [masked_loss(logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels)) if count(labels[i : i + 1])]
    return torch.stack(rows).mean()


LOSS_MASKING: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logits at t are compared with the label at t": lambda logits, labels: F.cross_entropy(
        logits.flatten(0, 1), labels.flatten()
    ),
    "logits at t < T are compared with the label at t": lambda logits, labels: masked_loss(logits, labels.roll(1, 1)),
    "the last label of each row is left out": lambda logits, labels: masked_loss(logits[:, :-1], labels[:, :-1]),
    "the last position of a row predicts the first label of the next": lambda logits, labels: masked_loss(
        logits.flatten(0, 1)[None], labels.flatten()[None]
    ),
    "positions without a label are learned as token 0": lambda logits, labels: masked_loss(logits, labels.clamp(min=0)),
    "token 0 is taken for padding": lambda logits, labels: masked_loss(  # NVIDIA-NeMo/Megatron-Bridge#4660
        logits, labels.masked_fill(labels == 0, IGNORED)
    ),
    "the sum is not divided": loss_sum,
    "the sum is divided by all predictions": lambda logits, labels: loss_sum(logits, labels) / labels[:, 1:].numel(),
    "the labels are counted before the shift": lambda logits, labels: (
        loss_sum(logits, labels) / (labels != IGNORED).sum()
    ),
    "it is the mean of the means of the rows": mean_of_rows,
}

# --- accumulation ---

Batches = Sequence[tuple[Tensor, Tensor]]


def mean_of_means(weight: Callable[[Tensor], int], W: Tensor, batches: Batches) -> Tensor:
    """Return the mean of the micro-batches' own gradients, which are 0 without labels, by a weight of their labels."""
    gradients = [weight(labels) * accumulated_gradient(W, [(x, labels)]) for x, labels in batches if count(labels)]
    return torch.stack(gradients).sum(0) / sum(weight(labels) for _, labels in batches)


def predictions(micro_batches: Batches) -> Any:
    return sum(count(labels) for _, labels in micro_batches)


ACCUMULATION: Mapping[str, Callable[[Tensor, Batches], Tensor]] = {
    "it is the mean of the means of the micro-batches": partial(  # huggingface/transformers#34191
        mean_of_means, lambda labels: 1
    ),
    "the means of the micro-batches are weighted by their rows": partial(mean_of_means, len),
    "the sum is not divided": lambda W, batches: accumulated_gradient(W, batches) * predictions(batches),
    "the labels are counted before the shift": lambda W, batches: (
        accumulated_gradient(W, batches)
        * predictions(batches)
        / sum((labels != IGNORED).sum() for _, labels in batches)
    ),
    "the mean is divided by the micro-batches": lambda W, batches: accumulated_gradient(W, batches) / len(batches),
    "the gradient is that of the last micro-batch": lambda W, batches: accumulated_gradient(W, batches[-1:]),
}

# --- the chat mask: `render` is a correct one ---

Messages = Sequence[Mapping[str, str]]
Rendered = tuple[Sequence[str], Sequence[bool]]
Spans = list[tuple[int, int]]
Render = Callable[..., Rendered]


def spans_of(mask: Sequence[bool]) -> Spans:
    """Return begin and end of each run of labelled tokens."""
    edges = [i for i in range(len(mask) + 1) if (i > 0 and mask[i - 1]) != (i < len(mask) and mask[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def with_spans(change: Callable[[Messages, Sequence[str], Spans], Spans]) -> Render:
    """Return a rendering that labels `change(messages, tokens, correct spans)`."""

    def wrong(messages: Messages, render: Render = render_chat) -> Rendered:
        tokens, mask = render(messages)
        spans = change(messages, tokens, spans_of(mask))
        return tokens, [any(begin <= i < end for begin, end in spans) for i in range(len(tokens))]

    return wrong


def moved(begins: int, ends: int) -> Render:
    """Return a rendering whose labels begin and end some tokens later than the correct ones."""
    return with_spans(lambda messages, tokens, spans: [(begin + begins, end + ends) for begin, end in spans])


CHAT_MASK: Mapping[str, Render] = {
    "everything is learned": with_spans(lambda messages, tokens, spans: [(0, len(tokens))]),
    "only the first reply is learned": with_spans(lambda messages, tokens, spans: spans[:1]),
    "only the last reply is learned": with_spans(lambda messages, tokens, spans: spans[-1:]),
    "the end token after a reply is not learned": moved(0, -1),  # verl-project/verl#535
    "the end token of an empty reply is not learned": with_spans(
        lambda messages, tokens, spans: [(begin, end) for begin, end in spans if end > begin + 1]
    ),
    "the token in front of a reply is learned": moved(-1, 0),
    "the mask is one token early": moved(-1, -1),
    "the mask is one token late": moved(1, 1),  # zai-org/ChatGLM3#184
}

# --- the table ---

CATALOGUE: Mapping[str, Mapping[str, Any]] = {
    "lora": LORA,
    "rslora": RSLORA,
    "dora": DORA,
    "merge": MERGE,
    "merge_dora": MERGE_DORA,
    "adapter_sum": ADAPTER_SUM,
    "nf4": NF4,
    "double_quant": DOUBLE_QUANT,
    "linear4bit": LINEAR4BIT,
    "loss_masking": LOSS_MASKING,
    "accumulation": ACCUMULATION,
    "chat_mask": CHAT_MASK,
}
