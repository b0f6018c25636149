"""Planted mistakes in chat masks and in an adapter's files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from minilora.testing.mutants_lora import Plant, Table, wrapped

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
    ("all tokens are learned", "", masked(lambda tokens, mask: [True] * len(mask))),
    ("labels and prompts are exchanged", "", masked(lambda tokens, mask: [not is_label for is_label in mask])),
    (
        "all after the first reply's begin is learned",
        "",
        spans(lambda s: [(s[0][0], 2**31)] if s else s),
    ),
    ("only the last reply is learned", "", spans(lambda s: s[-1:])),
    ("only the first reply is learned", "", spans(lambda s: s[:1])),
    ("the second of two replies in a row is not learned", "huggingface/trl#3224", wrapped(second_of_two_replies)),
    ("the end token is not learned", "verl-project/verl#535", spans(lambda s: [(begin, end - 1) for begin, end in s])),
    ("all end tokens are learned", "", masked(all_end_tokens)),
    ("the token after the end token is learned", "", spans(lambda s: [(begin, end + 1) for begin, end in s])),
    ("the token before a reply is learned", "", spans(lambda s: [(begin - 1, end) for begin, end in s])),
    ("the first token of a reply is not learned", "", spans(lambda s: [(begin + 1, end) for begin, end in s])),
    ("the mask is one token late", "zai-org/ChatGLM3#184", masked(lambda tokens, mask: [False, *mask[:-1]])),
    (
        "the end token of an empty reply is not learned",
        "",
        spans(lambda s: [(begin, end) for begin, end in s if end > begin + 1]),
    ),
    ("a reply is found by its text, in the question, too", "", masked(found_by_its_text)),
    ("the last reply has no end token", "", wrapped(no_last_end)),
    ("the system message is learned", "", wrapped(system_is_learned)),
    ("the caller's messages lose the system message", "", wrapped(system_is_taken_out)),
    ("a conversation as long as one before gets its tokens", "", kept_by_length),
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


def other_rank(files: Files) -> Files:
    return config(r=files["config"]["r"] + 1)(files)


ADAPTER_DIRECTORY: Table = [
    ("lora_A and lora_B are exchanged", "", tensors(lambda name, array: (exchanged(name), array))),
    ("lora_A is stored transposed", "", tensors(lambda name, array: (name, array.T if "lora_A" in name else array))),
    ("r of the config is not that of the tensors", "", other_rank),
    ("rank_pattern is missing", "", config(rank_pattern=None)),
    ("lora_alpha is missing", "", config(lora_alpha=None)),
    (
        "a lora_B is missing",
        "",
        tensors(lambda name, array: None if name.endswith("v_proj.lora_B.weight") else (name, array)),
    ),
    ("numbers are NaN", "", tensors(one_nan)),
    (
        "names lack base_model.model.",
        "vllm-project/vllm#34186",
        tensors(lambda name, array: (name.removeprefix("base_model.model."), array)),
    ),
    ("use_dora without a magnitude", "", config(use_dora=True)),
    ("a target module has no tensors", "", config(target_modules=["q_proj", "v_proj", "k_proj"])),
    ("peft_type is missing", "", config(peft_type=None)),
]
