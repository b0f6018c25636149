"""Mistakes in masked losses, in accumulated gradients and in chat masks: see `catalogue`.

The threads in comments are those where a mistake was seen.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.testing.implementations import accumulated_gradient, loss_sum, masked_loss, render_chat

IGNORE = -100

# --- the masked loss, of logits and labels ---


def count(labels: Tensor) -> Tensor:
    """Return how many labels are predicted: that of a row's first token is not."""
    return (labels[:, 1:] != IGNORE).sum()


def mean_of_rows(logits: Tensor, labels: Tensor) -> Tensor:
    rows = [masked_loss(logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels)) if count(labels[i : i + 1])]
    return torch.stack(rows).mean()


LOSS_MASKING: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logits at t are compared with the label at t": lambda logits, labels: F.cross_entropy(
        logits.flatten(0, 1), labels.flatten()
    ),
    "the last position of a row predicts the first label of the next": lambda logits, labels: masked_loss(
        logits.flatten(0, 1)[None], labels.flatten()[None]
    ),
    "positions without a label are learned as token 0": lambda logits, labels: masked_loss(logits, labels.clamp(min=0)),
    "token 0 is taken for padding": lambda logits, labels: masked_loss(  # NVIDIA-NeMo/Megatron-Bridge#4660
        logits, labels.masked_fill(labels == 0, IGNORE)
    ),
    "the sum is not divided": loss_sum,
    "the sum is divided by all predictions": lambda logits, labels: loss_sum(logits, labels) / labels[:, 1:].numel(),
    "the labels are counted before the shift": lambda logits, labels: (
        loss_sum(logits, labels) / (labels != IGNORE).sum()
    ),
    "it is the mean of the means of the rows": mean_of_rows,
}

# --- accumulation ---

Batches = Sequence[tuple[Tensor, Tensor]]


def mean_of_means(W: Tensor, micro_batches: Batches) -> Tensor:
    """Return the mean of the micro-batches' own gradients; those without labels are left out."""
    gradients = [accumulated_gradient(W, [batch]) for batch in micro_batches if count(batch[1])]
    return torch.stack(gradients).mean(0)


def mean_by_rows(W: Tensor, micro_batches: Batches) -> Tensor:
    gradients = [len(labels) * accumulated_gradient(W, [(x, labels)]) for x, labels in micro_batches if count(labels)]
    return torch.stack(gradients).sum(0) / sum(len(labels) for _, labels in micro_batches)


def predictions(micro_batches: Batches) -> Any:
    return sum(count(labels) for _, labels in micro_batches)


ACCUMULATION: Mapping[str, Callable[[Tensor, Batches], Tensor]] = {
    "it is the mean of the means of the micro-batches": mean_of_means,  # huggingface/transformers#34191
    "the means of the micro-batches are weighted by their rows": mean_by_rows,
    "the sum is not divided": lambda W, batches: accumulated_gradient(W, batches) * predictions(batches),
    "the labels are counted before the shift": lambda W, batches: (
        accumulated_gradient(W, batches) * predictions(batches) / sum((labels != IGNORE).sum() for _, labels in batches)
    ),
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


def found_by_its_text(messages: Messages, tokens: Sequence[str], spans: Spans) -> Spans:
    found = []
    for begin, end in spans:
        length = end - begin - 1  # without the end token
        same = (i for i in range(begin + 1) if tokens[i : i + length] == tokens[begin : begin + length])
        first = next(same) if length else begin
        found.append((first, first + length + 1))
    return found


def second_reply_lost(messages: Messages, tokens: Sequence[str], spans: Spans) -> Spans:
    roles = ["", *(message["role"] for message in messages)]
    previous = [before for before, role in pairwise(roles) if role == "assistant"]
    return [span for span, before in zip(spans, previous, strict=False) if before != "assistant"]


CHAT_MASK: Mapping[str, Render] = {
    "everything is learned": with_spans(lambda messages, tokens, spans: [(0, len(tokens))]),
    "only the first reply is learned": with_spans(lambda messages, tokens, spans: spans[:1]),
    "only the last reply is learned": with_spans(lambda messages, tokens, spans: spans[-1:]),
    "the second of two replies in a row is not learned": with_spans(second_reply_lost),  # huggingface/trl#3224
    "the end token after a reply is not learned": moved(0, -1),  # verl-project/verl#535
    "the end token of an empty reply is not learned": with_spans(
        lambda messages, tokens, spans: [(begin, end) for begin, end in spans if end > begin + 1]
    ),
    "the token in front of a reply is learned": moved(-1, 0),
    "the mask is one token early": moved(-1, -1),
    "the mask is one token late": moved(1, 1),  # zai-org/ChatGLM3#184
    "a reply is found by its text, even in the question": with_spans(found_by_its_text),
}
