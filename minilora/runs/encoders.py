"""Tokenize rows, and label the tokens that are trained on.

Targets are spans of characters, which the tokenizer's offsets map to tokens. To count the tokens of the prompt alone
would be wrong where one token holds the end of the prompt and the beginning of the answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path

from minilora.data import Example, Span, label_tokens
from minilora.errors import ConfigError, DataError
from minilora.models.tokenizer import Tokenizer
from minilora.runs.config import DataConfig, TrainOn
from minilora.runs.dataset import Dataset, build_dataset
from minilora.runs.formats import Conversation, Fields, PromptCompletion, Row, parse_row
from minilora.storage import ASSETS, read_text

OPEN, CLOSE = "\ufdd4", "\ufdd5"  # noncharacters that mark answers where the template has no marks


def encode_rows(
    rows: Iterable[Row], tokenizer: Tokenizer, config: DataConfig, show: Callable[[str], None] | None = None
) -> Dataset:
    """Tokenize and label every row; `show` is called with lines on the progress.

    Raises:
        DataError: as for `build_dataset`.
    """
    return build_dataset(rows, partial(label_row, tokenizer=tokenizer, config=config), config, show)


def label_row(row: Row, tokenizer: Tokenizer, config: DataConfig) -> tuple[Example, list[str]]:
    """Tokenize a row and label what is learned of it; return also names of counts of `Dataset`."""
    parsed, is_quoted = _parse(row, tokenizer, config)
    counts = ["quoted"] if is_quoted else []
    if isinstance(parsed, PromptCompletion):
        if parsed.prompt:
            counts.append("completions")
            if not (parsed.prompt[-1].isspace() or parsed.completion[:1].isspace()):
                counts.append("touching")
        tokens, labels = _encode_text(parsed, tokenizer, config.train_on)
    else:
        counts.append("conversations")
        text, learned = render_conversation(parsed, tokenizer, config.train_on)
        tokens, spans = tokenizer.encode_spans(text, add_special_tokens=False)
        labels = label_tokens(tokens, spans, learned)
    example = Example(tokens, labels, row.source)
    if not example.labelled:
        raise DataError("nothing to learn: no token of an answer can be predicted")
    return example, counts


def _parse(row: Row, tokenizer: Tokenizer, config: DataConfig) -> tuple[PromptCompletion | Conversation, bool]:
    """Parse a row and quote the control tokens in it, unless they are allowed; return also whether there were any."""
    parsed = parse_row(row.fields, config)
    if isinstance(parsed, PromptCompletion):  # `_encode_text` appends the end token, so one in the text is removed
        closing = tokenizer.special_tokens.get("eos_token", "")
        parsed = replace(parsed, completion=parsed.completion.removesuffix(closing))
    if config.allow_special:
        return parsed, False
    quoted = replace(parsed, **{name: tokenizer.quote(value) for name, value in vars(parsed).items()})
    return quoted, quoted != parsed


def _encode_text(parsed: PromptCompletion, tokenizer: Tokenizer, train_on: TrainOn) -> tuple[list[int], list[int]]:
    """Tokenize prompt and completion as one text and append the end token, which is always labelled."""
    prompt, text = parsed.prompt, parsed.prompt + parsed.completion
    tokens, spans = tokenizer.encode_spans(text)
    labels = label_tokens(tokens, spans, [(0 if train_on == "all" else len(prompt), len(text))])
    if tokenizer.eos_id is not None:
        if tokens[-1:] != [tokenizer.eos_id]:
            tokens, labels = [*tokens, tokenizer.eos_id], [*labels, tokenizer.eos_id]
        labels[-1] = tokenizer.eos_id
    return tokens, labels


def use_prompt_style(tokenizer: Tokenizer, style: str, rows: Iterable[Row] = ()) -> Tokenizer:
    """Return the tokenizer with the chat template of a prompt style.

    "auto" is the tokenizer's own; if it has none and a row has an `instruction`, "alpaca".
    """
    if style == "auto":
        needs_one = tokenizer.template is None and any("instruction" in row.fields for row in rows)
        return use_prompt_style(tokenizer, "alpaca") if needs_one else tokenizer
    if style not in ("alpaca", "instruction"):
        if not style.endswith(".jinja"):
            raise ConfigError(f"prompt_style is {style!r}; accepted are auto, alpaca, instruction, and a .jinja file")
        return tokenizer.with_template(read_text(Path(style), is_named=True))
    source = read_text(ASSETS / "prompts" / "instruction.jinja")
    bos = tokenizer.token_id(tokenizer.special_tokens.get("bos_token"))
    begin = "{{ bos_token }}" if [bos] == tokenizer.encode("a")[:1] else ""  # as the tokenizer begins every text
    if tokenizer.eos_id is not None and tokenizer.token_id(tokenizer.special_tokens.get("eos_token")) is None:
        closing = tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False)
        begin += f"{{% set eos_token = {json.dumps(closing)} %}}"
    return tokenizer.with_template(begin + "{% set preamble = true %}" * (style == "alpaca") + source)


def render_conversation(conversation: Conversation, tokenizer: Tokenizer, train_on: TrainOn) -> tuple[str, list[Span]]:
    """Render a conversation; return the text, and the spans of it that are trained on."""
    if tokenizer.template is None:
        raise DataError(
            "a conversation needs a chat template, and the model has none: take an instruct model, give --prompt-style "
            "alpaca, instruction or a .jinja file, or use rows of prompt and completion"
        )
    if train_on == "all":
        text = tokenizer.template.render(conversation.messages, tools=conversation.tools)
        learned = [(0, len(text))]
    else:
        text, learned = tokenizer.template.render_spans(conversation.messages, tools=conversation.tools)
        learned = _merge_adjacent(learned) or _assistant_spans(text, conversation, tokenizer, train_on)
        learned = learned if train_on == "assistant" else learned[-1:]
    _check_complete(text, conversation, tokenizer, train_on)
    return text, learned


def _check_complete(text: str, conversation: Conversation, tokenizer: Tokenizer, train_on: TrainOn) -> None:
    """Raise a DataError if a question or target is not in the text: some templates need text, some a list of parts."""
    messages = conversation.messages
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    for i, message in enumerate(messages):
        if message["role"] == "user" or (message["role"] == "assistant" and (train_on != "completion" or i == last)):
            content = message.get("content") or ""
            written = content if isinstance(content, str) else "".join(part["text"] for part in content)
            wanted = {written, message.get("instruction", written)}  # an Alpaca row has its question in both
            if not any(each.rpartition("</think>")[2].strip() in text for each in wanted):  # thoughts may be left out
                raise DataError(
                    f"the chat template leaves out what message {i} says; it may want content as text, or as parts"
                )
            if message.get("tool_calls"):
                without = [*messages[:i], {**message, "tool_calls": None}, *messages[i + 1 :]]
                if tokenizer.render(without, tools=conversation.tools) == text:
                    raise DataError(f"the chat template leaves out the tool calls of message {i}")


def _merge_adjacent(spans: list[Span]) -> list[Span]:
    """Merge adjacent spans: a template may mark an answer and its closing token separately."""
    merged: list[Span] = []
    for begin, end in spans:
        if merged and merged[-1][1] == begin:
            begin = merged.pop()[0]
        merged.append((begin, end))
    return merged


def _assistant_spans(text: str, conversation: Conversation, tokenizer: Tokenizer, train_on: TrainOn) -> list[Span]:
    """Return the spans of the assistant's turns, for templates that do not mark them.

    A span begins after the generation prompt and ends with the turn. It is found by rendering the messages up to it,
    which must give a prefix of the whole text; if it does not, by marks around the answers.
    """
    turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    spans, found = [], None
    for number, i in list(enumerate(turns)) if train_on == "assistant" else [(-1, turns[-1])]:
        span = _message_span(text, conversation, i, tokenizer)
        if span is None:
            found = found or _find_answers(text, conversation, tokenizer)
            if not found:
                advice = "; --train-on completion learns the last answer only" if train_on == "assistant" else ""
                raise DataError(
                    f"the chat template renders message {i}, or those before it, differently once others follow, or "
                    f"does not begin an answer as it asks for one, so its tokens cannot be found{advice}"
                )
            span = found[number]
        spans.append(span)
    return spans


def _message_span(text: str, conversation: Conversation, i: int, tokenizer: Tokenizer) -> Span | None:
    """Return the span of message i; None if the messages up to it are not rendered as a prefix of the text."""
    messages, tools = conversation.messages, conversation.tools
    try:
        through = tokenizer.render(messages[: i + 1], tools=tools)
        before = tokenizer.render(messages[: max(i, 1)], add_generation_prompt=True, tools=tools)
    except DataError:  # some templates refuse a conversation that breaks off
        return None
    if not text.startswith(through):  # phi3's template closes the whole text, not the turn, with the end token
        through = through.removesuffix(tokenizer.special_tokens.get("eos_token", ""))
    if i == 0:  # no message comes before; the generation prompt is inside the turn
        header = before.removeprefix(through)
        before = through[: through.index(header) + len(header)] if header in through else before
    return (len(before), len(through)) if text.startswith(through) and through.startswith(before) else None


def _find_answers(text: str, conversation: Conversation, tokenizer: Tokenizer) -> list[Span] | None:
    """Return the span of every answer, with its closing token, by rendering marks around it; None if that fails.

    Answers with more than content, such as tool calls, are not found like this: the marks would miss the rest.
    """

    def pieces(messages: Sequence[Fields]) -> list[str]:
        return tokenizer.render(messages, tools=conversation.tools).replace(CLOSE, OPEN).split(OPEN)

    messages, last = list(conversation.messages), 0
    for i, message in enumerate(conversation.messages):
        content = message.get("content")
        if message["role"] == "assistant":
            has_more = any(message[key] for key in message.keys() - {"role", "content", "name", "weight"})
            if not isinstance(content, str) or not content.strip() or has_more:
                return None
            last = i
            for core in (content, content.strip()):  # many templates strip
                messages[i] = {**message, "content": content.replace(core, f"{OPEN}{core}{CLOSE}", 1)}
                if "".join(pieces(messages)) == text:
                    break
    found, closing = pieces(messages), pieces(messages[: last + 1])[-1]
    answers = sum(message["role"] == "assistant" for message in messages)
    is_whole = "".join(found) == text and len(found) == 2 * answers + 1
    if not (is_whole and all(after.startswith(closing) for after in found[2::2])):
        return None
    ends = list(accumulate(map(len, found)))
    return [(begin, end + len(closing)) for begin, end in zip(ends[0::2], ends[1::2], strict=False)]
