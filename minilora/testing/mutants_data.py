"""Planted mistakes in masked losses, accumulated gradients, chat masks and an adapter's files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilora.testing.mutants_lora import Plant, Table, gradient_times, wrapped

IGNORE = -100

# --- the masked loss, of logits z and labels y ---


def count(labels: Tensor) -> Tensor:
    return (labels[:, 1:] != IGNORE).sum()


def column(labels: Tensor) -> Tensor:
    """Return a column of ignored labels."""
    return torch.full_like(labels[:, :1], IGNORE)


def times(factor: Callable[[Tensor], Any]) -> Plant:
    """Plant a loss that is `factor(labels)` times the correct one."""
    return wrapped(lambda loss, z, y: loss(z, y) * factor(y))


def labelled(change: Callable[[Tensor], Tensor]) -> Plant:
    """Plant other labels."""
    return wrapped(lambda loss, z, y: loss(z, change(y)))


def not_shifted(loss: Any, z: Tensor, y: Tensor) -> Tensor:
    return loss(torch.cat([z, z[:, :1]], dim=1), torch.cat([column(y), y], dim=1))


def shifted_back(loss: Any, z: Tensor, y: Tensor) -> Tensor:
    return loss(z.roll(-1, dims=1), torch.cat([column(y), y[:, :-1]], dim=1))


def mean_of_rows(loss: Any, z: Tensor, y: Tensor) -> Tensor:
    rows = [loss(z[i : i + 1], y[i : i + 1]) for i in range(len(y)) if count(y[i : i + 1])]
    return torch.stack(rows).mean()


def first_label_lost(labels: Tensor) -> Tensor:
    is_label = labels != IGNORE
    return labels.masked_fill(is_label & (is_label.cumsum(1) == 1), IGNORE)


def labels_overwritten(loss: Any, z: Tensor, y: Tensor) -> Tensor:
    result = loss(z, y)
    y[y == IGNORE] = 0
    return result


LOSS_MASKING: Table = [
    # the shift
    ("labels are not shifted", wrapped(not_shifted)),
    ("labels are shifted twice", labelled(lambda y: torch.cat([y[:, 1:], column(y)], 1)), "wdndev/tiny-llm-zh#10"),
    ("labels are shifted the wrong way", wrapped(shifted_back)),
    (
        "the end of a row predicts the start of the next",
        wrapped(lambda loss, z, y: loss(z.flatten(0, 1)[None], y.flatten()[None])),
    ),
    ("the first label of a row is not learned", labelled(first_label_lost), "NVIDIA-NeMo/Speech#6409"),
    ("the last label of a row is not learned", labelled(lambda y: first_label_lost(y.flip(1)).flip(1))),
    # which tokens
    ("masked tokens are learned as token 0", labelled(lambda y: y.clamp(min=0))),
    (
        "token 0 is taken for padding",
        labelled(lambda y: y.masked_fill(y == 0, IGNORE)),
        "NVIDIA-NeMo/Megatron-Bridge#4660",
    ),
    # the denominator
    ("divided by all tokens, masked or not", times(lambda y: count(y) / y[:, 1:].numel())),
    ("divided by labels counted before the shift", times(lambda y: count(y) / (y != IGNORE).sum())),
    ("the mean of the rows' means", wrapped(mean_of_rows)),
    ("a sum instead of a mean", times(count)),
    (
        "a row without labels makes NaN",
        times(lambda y: torch.stack([count(row[None]) / count(row[None]) for row in y]).mean()),
    ),
    # the loss of a token
    ("softmax before the cross entropy", wrapped(lambda loss, z, y: loss(z.softmax(-1), y))),
    (
        "exp without subtracting the maximum",
        wrapped(lambda loss, z, y: loss(z - z.exp().sum(-1, keepdim=True).log(), y)),
    ),
    ("logits are rounded to bfloat16", wrapped(lambda loss, z, y: loss(z.bfloat16().to(z.dtype), y))),
    ("the gradient is that of the sum", wrapped(lambda loss, z, y: gradient_times(count(y), loss(z, y)))),
    ("the caller's labels are changed", wrapped(labels_overwritten)),
]


# --- accumulation ---

Batches = Sequence[tuple[Tensor, Tensor]]


def one_by_one(weight: Callable[[Tensor, Tensor], Any], total: Callable[[list[Any]], Any] = sum) -> Plant:
    """Plant a sum of the micro-batches' own gradients, each times `weight(x, labels)`, divided by the total of these.

    A micro-batch without labels is left out, so that this is not a second mistake.
    """

    def change(step: Any, W: Tensor, micro_batches: Batches) -> Tensor:
        batches = [batch for batch in micro_batches if count(batch[1])]
        weights = [weight(*batch) for batch in batches]
        gradients = [w * step(W, [batch]) for w, batch in zip(weights, batches, strict=True)]
        return torch.stack(gradients).sum(0) / total(weights)

    return wrapped(change)


def counted_before_the_shift(step: Any, W: Tensor, micro_batches: Batches) -> Tensor:
    all_labels = torch.cat([labels.flatten() for _, labels in micro_batches])
    return step(W, micro_batches) * sum(count(labels) for _, labels in micro_batches) / (all_labels != IGNORE).sum()


def nan_without_labels(step: Any, W: Tensor, micro_batches: Batches) -> Tensor:
    counts = torch.stack([count(labels) for _, labels in micro_batches])
    return step(W, micro_batches) * (counts / counts).mean()


def clipped_each(step: Any, W: Tensor, micro_batches: Batches) -> Tensor:
    counts = [count(labels) for _, labels in micro_batches]
    sums = [n * step(W, [batch]) for n, batch in zip(counts, micro_batches, strict=True) if n]
    return torch.stack([gradient / gradient.norm().clamp(min=1) for gradient in sums]).sum(0) / sum(counts)


def stepped_each(step: Any, W: Tensor, micro_batches: Batches) -> Tensor:
    weights, total, moved = [count(labels) for _, labels in micro_batches], torch.zeros_like(W), W.detach().clone()
    for weight, batch in zip(weights, micro_batches, strict=True):
        if weight:
            gradient = weight / sum(weights) * step(moved, [batch])
            total, moved = total + gradient, moved - 0.1 * gradient
    return total


def never_zeroed(step: Any) -> Any:
    kept: list[Tensor] = []

    def change(step: Any, W: Tensor, micro_batches: Batches) -> Tensor:
        kept.append(step(W, micro_batches))
        return torch.stack([gradient for gradient in kept if gradient.shape == W.shape]).sum(0)

    return wrapped(change)(step)


def weight_changed(step: Any, W: Tensor, micro_batches: Batches) -> Tensor:
    gradient = step(W, micro_batches)
    W.detach().sub_(0.1 * gradient)
    return gradient


ACCUMULATION: Table = [
    ("the mean of the micro-batches' means", one_by_one(lambda x, labels: 1), "huggingface/transformers#34191"),
    ("the sum of the micro-batches' means", one_by_one(lambda x, labels: 1, total=lambda weights: 1)),
    ("micro-batches are weighted by rows", one_by_one(lambda x, labels: len(x)), "mosaicml/composer#3273"),
    ("micro-batches are weighted by tokens, masked or not", one_by_one(lambda x, labels: labels.numel())),
    ("labels are counted before the shift", wrapped(counted_before_the_shift)),
    (
        "all micro-batches are divided by the labels of the first",
        one_by_one(lambda x, labels: count(labels), total=lambda weights: weights[0] * len(weights)),
    ),
    ("only the last micro-batch counts", wrapped(lambda step, W, batches: step(W, batches[-1:]))),
    (
        "the last of an odd number of micro-batches is left out",
        wrapped(lambda step, W, batches: step(W, batches[: len(batches) // 2 * 2] or batches)),
        "ml-explore/mlx-lm#1413",
    ),
    ("a micro-batch without labels makes NaN", wrapped(nan_without_labels)),
    ("each micro-batch is clipped to norm 1", wrapped(clipped_each)),
    ("the weight is stepped after each micro-batch", wrapped(stepped_each)),
    ("the gradient of the call before is still there", never_zeroed),
    ("the caller's weight is changed", wrapped(weight_changed)),
]


# --- the chat mask ---

Spans = list[tuple[int, int]]
Messages = list[dict[str, str]]


def spans_of(mask: Sequence[bool]) -> Spans:
    """Return begin and end of each run of labelled tokens."""
    edges = [i for i in range(len(mask) + 1) if (i > 0 and mask[i - 1]) != (i < len(mask) and mask[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def masked(change: Callable[[list[str], list[bool]], Iterable[bool]]) -> Plant:
    """Plant another mask, of the tokens and the correct mask."""

    def changed(render: Any, messages: Messages) -> tuple[list[str], list[bool]]:
        tokens, mask = render(messages)
        return tokens, list(change(tokens, list(mask)))

    return wrapped(changed)


def spans(change: Callable[[Spans], Spans]) -> Plant:
    """Plant other spans of labelled tokens."""

    def changed(tokens: list[str], mask: list[bool]) -> list[bool]:
        new = change(spans_of(mask))
        return [any(begin <= i < end for begin, end in new) for i in range(len(tokens))]

    return masked(changed)


def found_by_its_text(tokens: list[str], mask: list[bool]) -> list[bool]:
    new = [False] * len(mask)
    for begin, end in spans_of(mask):
        length = end - begin - 1  # without the end token
        found = next(i for i in range(begin + 1) if tokens[i : i + length] == tokens[begin : begin + length])
        found = found if length else begin
        new[found : found + length + 1] = [True] * (length + 1)
    return new


def all_end_tokens(tokens: list[str], mask: list[bool]) -> list[bool]:
    ends = {tokens[end - 1] for _, end in spans_of(mask)}
    return [is_label or token in ends for token, is_label in zip(tokens, mask, strict=True)]


def second_of_two_replies(render: Any, messages: Messages) -> tuple[list[str], list[bool]]:
    tokens, mask = render(messages)
    roles = [message["role"] for message in messages]
    follows = [before for before, role in zip(["", *roles], roles, strict=False) if role == "assistant"]
    for (begin, end), before in zip(spans_of(mask), follows, strict=False):
        if before == "assistant":
            mask[begin:end] = [False] * (end - begin)
    return tokens, mask


def no_last_end(render: Any, messages: Messages) -> tuple[list[str], list[bool]]:
    tokens, mask = render(messages)
    if messages and messages[-1]["role"] == "assistant":
        end = spans_of(mask)[-1][1]
        return tokens[: end - 1], mask[: end - 1]
    return tokens, mask


def system_is_learned(render: Any, messages: Messages) -> tuple[list[str], list[bool]]:
    tokens, mask = render(messages)
    if messages and messages[0]["role"] == "system":
        length = len(render(messages[:1])[0])
        mask = [True] * length + mask[length:]
    return tokens, mask


def system_is_taken_out(render: Any, messages: Messages) -> tuple[list[str], list[bool]]:
    result = render(messages)
    messages[:] = [message for message in messages if message["role"] != "system"]
    return result


def kept_by_length(render: Any) -> Any:
    kept: dict[int, Any] = {}
    return wrapped(lambda render, messages: kept.setdefault(len(messages), render(messages)))(render)


CHAT_MASK: Table = [
    ("all tokens are learned", masked(lambda tokens, mask: [True] * len(mask))),
    ("labels and prompts are exchanged", masked(lambda tokens, mask: [not is_label for is_label in mask])),
    ("all after the first reply's begin is learned", spans(lambda s: [(s[0][0], 2**31)] if s else s)),
    ("only the last reply is learned", spans(lambda s: s[-1:])),
    ("only the first reply is learned", spans(lambda s: s[:1])),
    ("the second of two replies in a row is not learned", wrapped(second_of_two_replies), "huggingface/trl#3224"),
    ("the end token is not learned", spans(lambda s: [(begin, end - 1) for begin, end in s]), "verl-project/verl#535"),
    ("all end tokens are learned", masked(all_end_tokens)),
    ("the token after the end token is learned", spans(lambda s: [(begin, end + 1) for begin, end in s])),
    ("the token before a reply is learned", spans(lambda s: [(begin - 1, end) for begin, end in s])),
    ("the first token of a reply is not learned", spans(lambda s: [(begin + 1, end) for begin, end in s])),
    ("the mask is one token late", masked(lambda tokens, mask: [False, *mask[:-1]]), "zai-org/ChatGLM3#184"),
    (
        "the end token of an empty reply is not learned",
        spans(lambda s: [(begin, end) for begin, end in s if end > begin + 1]),
    ),
    ("a reply is found by its text, in the question, too", masked(found_by_its_text)),
    ("the last reply has no end token", wrapped(no_last_end)),
    ("the system message is learned", wrapped(system_is_learned)),
    ("the caller's messages lose the system message", wrapped(system_is_taken_out)),
    ("a conversation as long as one before gets its tokens", kept_by_length),
]


# --- the adapter's files ---

Files = Mapping[str, Mapping[str, Any]]


def config(**changes: Any) -> Plant:
    """Plant other values in adapter_config.json; those that are None are left out."""

    def plant(files: Files) -> Files:
        new = {**files["config"], **changes}
        return {**files, "config": {key: value for key, value in new.items() if value is not None}}

    return plant


def tensors(change: Callable[[str, Any], tuple[str, Any] | None]) -> Plant:
    """Plant other names or arrays; a tensor for which `change` returns None is left out."""

    def plant(files: Files) -> Files:
        changed = [change(name, array) for name, array in files["tensors"].items()]
        return {**files, "tensors": dict(item for item in changed if item is not None)}

    return plant


def exchanged(name: str) -> str:
    return name.replace("lora_A", "lora_?").replace("lora_B", "lora_A").replace("lora_?", "lora_B")


def one_nan(name: str, array: Any) -> tuple[str, Any]:
    array = array.copy()
    array.flat[-1] = np.nan
    return name, array


ADAPTER_DIRECTORY: Table = [
    ("lora_A and lora_B are exchanged", tensors(lambda name, array: (exchanged(name), array))),
    ("lora_A is stored transposed", tensors(lambda name, array: (name, array.T if "lora_A" in name else array))),
    ("r of the config is not that of the tensors", lambda files: config(r=files["config"]["r"] + 1)(files)),
    ("rank_pattern is missing", config(rank_pattern=None)),
    ("lora_alpha is missing", config(lora_alpha=None)),
    (
        "a lora_B is missing",
        tensors(lambda name, array: None if name.endswith("v_proj.lora_B.weight") else (name, array)),
    ),
    ("numbers are NaN", tensors(one_nan)),
    (
        "names lack base_model.model.",
        tensors(lambda name, array: (name.removeprefix("base_model.model."), array)),
        "vllm-project/vllm#34186",
    ),
    ("use_dora without a magnitude", config(use_dora=True)),
    ("a target module has no tensors", config(target_modules=["q_proj", "v_proj", "k_proj"])),
    ("peft_type is missing", config(peft_type=None)),
]
