"""Rows of data become token ids and labels.

What is learned is marked in the characters of the text and carried over to tokens by their offsets: counting the
tokens of the prompt alone would be wrong wherever a token spans the seam.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
from pathlib import Path
from typing import overload

from minilora.errors import ConfigError, DataError
from minilora.model.ops import IGNORE_INDEX
from minilora.model.tokenizer import Tokenizer
from minilora.storage import ASSETS, read_text
from minilora.train.config import DataConfig, TrainOn
from minilora.train.formats import Conversation, Fields, Passage, understand
from minilora.train.rows import Row, find_splits, read_rows

Span = tuple[int, int]
FROM, TO = "\ufdd4", "\ufdd5"  # Unicode noncharacters, which mark answers where the template does not


@dataclass(frozen=True)
class Example:
    """One row as the model sees it. `labels[i]` is `tokens[i]` where that token is learned, else IGNORE_INDEX."""

    tokens: list[int]
    labels: list[int]
    source: str = ""

    @property
    def labelled(self) -> int:
        """How many tokens are learned. The first one is never predicted, so its label does not count."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])

    @property
    def prompt(self) -> list[int]:
        """The tokens before the first learned one."""
        return self.tokens[: next(i for i, label in enumerate(self.labels) if label != IGNORE_INDEX)]

    @property
    def answer(self) -> tuple[int, ...]:
        """The learned tokens that follow the prompt, up to the first that is not learned."""
        return tuple(takewhile(lambda label: label != IGNORE_INDEX, self.labels[len(self.prompt) :]))


@dataclass(frozen=True, repr=False)
class Dataset(Sequence[Example]):
    """Examples ready for training.

    `truncated` rows were cut to `max_length`, and `lost` labels with that. Not in are the `unlabelled` rows, which had
    none left, and those that could not be used, about which `bad` has a line each. `conversations` went through a chat
    template; `quoted` rows had control tokens in their text, which are plain text now.
    """

    examples: tuple[Example, ...]
    truncated: int = 0
    unlabelled: int = 0
    lost: int = 0
    bad: tuple[str, ...] = ()
    conversations: int = 0
    quoted: int = 0

    def __repr__(self) -> str:
        tokens = sum(len(example.tokens) for example in self.examples)
        counts = f"{self.truncated} truncated, {self.unlabelled} unlabelled, {len(self.bad)} bad"
        return f"Dataset({len(self)} rows, {tokens} tokens, {counts})"

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> Example | Dataset:
        return Dataset(self.examples[index]) if isinstance(index, slice) else self.examples[index]


def load_dataset(
    path: str | Path | Sequence[str | Path], tokenizer: Tokenizer, config: DataConfig | None = None
) -> Dataset:
    """Read the rows of files, and the training rows of directories, and encode them.

    Raises:
        DataError: a row that cannot be used, with file and line; a file without rows.
    """
    config = config or DataConfig()
    files = find_splits(path)
    if "train" not in files:
        raise DataError(f"{path}: there are no training rows; found {sorted(files)}")
    rows = read_rows(*files["train"])
    return encode_rows(rows, use_prompt_style(tokenizer, config.prompt_style, rows), config)


def use_prompt_style(tokenizer: Tokenizer, style: str, rows: Sequence[Row] = ()) -> Tokenizer:
    """The tokenizer with the chat template that a prompt style stands for.

    "auto" is the tokenizer's own; where it has none, and there are rows of instruction and output, it is "alpaca".

    Raises:
        ConfigError: no such style.
    """
    if style == "auto":
        needs_one = tokenizer.template is None and any("instruction" in row.fields for row in rows)
        return use_prompt_style(tokenizer, "alpaca") if needs_one else tokenizer
    if style not in ("alpaca", "instruction"):
        if not style.endswith(".jinja"):
            raise ConfigError(f"prompt_style is {style!r}; accepted are auto, alpaca, instruction, and a .jinja file")
        return tokenizer.with_template(read_text(Path(style)))
    source = read_text(ASSETS / "prompts" / "instruction.jinja")
    bos = tokenizer.token_id(tokenizer.special_tokens.get("bos_token"))
    begin = "{{ bos_token }}" if [bos] == tokenizer.encode("a")[:1] else ""  # as the tokenizer begins every text
    if tokenizer.eos_id is not None and tokenizer.token_id(tokenizer.special_tokens.get("eos_token")) is None:
        closing = tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False)
        begin += f"{{% set eos_token = {json.dumps(closing)} %}}"
    return tokenizer.with_template(begin + "{% set preamble = true %}" * (style == "alpaca") + source)


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer, config: DataConfig) -> Dataset:
    """Tokens and labels of every row.

    Raises:
        DataError: a row that cannot be used, unless those are skipped; no row has a label left.
    """
    examples, bad, conversations, quoted = [], [], 0, 0
    for row in rows:
        try:
            meaning, is_quoted = _read(row, tokenizer, config)
            examples.append(_encoded(meaning, row.source, tokenizer, config.train_on))
        except DataError as error:
            if not config.skip_bad_rows:
                raise
            bad.append(str(error))
        else:
            conversations += isinstance(meaning, Conversation)
            quoted += is_quoted
    limit = config.max_length
    cut = [Example(e.tokens[:limit], e.labels[:limit], e.source) for e in examples]
    kept = tuple(example for example in cut if example.labelled)
    if not kept:
        raise DataError(
            f"{rows[0].source}: no row of {len(rows)} has a label within its first {limit} tokens"
            + (f"; {len(bad)} were skipped, the first: {bad[0]}" if bad else "")
        )
    truncated = sum(len(e.tokens) > limit for e in examples)
    lost = sum(example.labelled for example in examples) - sum(example.labelled for example in cut)
    return Dataset(kept, truncated, len(cut) - len(kept), lost, tuple(bad), conversations, quoted)


def encode_row(row: Row, tokenizer: Tokenizer, config: DataConfig) -> Example:
    """Tokens and labels of one row, uncut.

    Raises:
        DataError: the row has none of the known shapes, a field of the wrong type, or nothing to learn.
    """
    return _encoded(_read(row, tokenizer, config)[0], row.source, tokenizer, config.train_on)


def _read(row: Row, tokenizer: Tokenizer, config: DataConfig) -> tuple[Passage | Conversation, bool]:
    """What a row means; what looks like a control token in it is quoted, unless asked otherwise: is anything?"""
    with _at(row.source):
        if row.problem:
            raise DataError(row.problem)
        meaning = understand(row.fields, config)
        if isinstance(meaning, Passage):  # one that brings its closing token gets no second one
            closing = tokenizer.special_tokens.get("eos_token", "")
            meaning = replace(meaning, completion=meaning.completion.removesuffix(closing))
        if config.allow_special:
            return meaning, False
        quoted = replace(meaning, **{name: tokenizer.quote(value) for name, value in vars(meaning).items()})
        return quoted, quoted != meaning


def _encoded(meaning: Passage | Conversation, source: str, tokenizer: Tokenizer, train_on: TrainOn) -> Example:
    with _at(source):
        if isinstance(meaning, Passage):
            tokens, labels = _encode_passage(meaning, tokenizer, train_on)
        else:
            tokens, labels = _encode_conversation(meaning, tokenizer, train_on)
        example = Example(tokens, labels, source)
        if not example.labelled:
            raise DataError("nothing to learn: no token of an answer can be predicted")
        return example


@contextmanager
def _at(source: str) -> Iterator[None]:
    """Errors say where."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def _encode_passage(passage: Passage, tokenizer: Tokenizer, train_on: TrainOn) -> tuple[list[int], list[int]]:
    """Prompt and completion as one text, closed by the end token, which is always a label if anything is."""
    prompt, text = passage.prompt, passage.prompt + passage.completion
    tokens, spans = tokenizer.encode_spans(text)
    labels = _labels(tokens, spans, [(0 if train_on == "all" else len(prompt), len(text))])
    if tokenizer.eos_id is not None:
        if tokens[-1:] != [tokenizer.eos_id]:
            tokens, labels = [*tokens, tokenizer.eos_id], [*labels, tokenizer.eos_id]
        labels[-1] = tokenizer.eos_id
    return tokens, labels


def _encode_conversation(
    conversation: Conversation, tokenizer: Tokenizer, train_on: TrainOn
) -> tuple[list[int], list[int]]:
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
        learned = _joined(learned) or _assistant_spans(text, conversation, tokenizer, train_on)
        learned = learned if train_on == "assistant" else learned[-1:]
    _check_whole(text, conversation, tokenizer, train_on)
    tokens, spans = tokenizer.encode_spans(text, add_special_tokens=False)
    return tokens, _labels(tokens, spans, learned)


def _check_whole(text: str, conversation: Conversation, tokenizer: Tokenizer, train_on: TrainOn) -> None:
    """What is asked and what is learned must be in the text: some templates want content as text, some as parts."""
    messages = conversation.messages
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    for i, message in enumerate(messages):
        if message["role"] == "user" or (message["role"] == "assistant" and (train_on != "completion" or i == last)):
            content = message.get("content") or ""
            said = content if isinstance(content, str) else "".join(part["text"] for part in content)
            wanted = {said, message.get("instruction", said)}  # an alpaca row's question is given in two ways
            if not any(each.rpartition("</think>")[2].strip() in text for each in wanted):  # thoughts may be left out
                raise DataError(
                    f"the chat template leaves out what message {i} says; it may want content as text, or as parts"
                )
            if message.get("tool_calls"):
                silent = [*messages[:i], {**message, "tool_calls": None}, *messages[i + 1 :]]
                if tokenizer.render(silent, tools=conversation.tools) == text:
                    raise DataError(f"the chat template leaves out the tool calls of message {i}")


def _joined(spans: list[Span]) -> list[Span]:
    """Spans that touch as one: a template may mark an answer and its closing token apart."""
    joined: list[Span] = []
    for begin, end in spans:
        if joined and joined[-1][1] == begin:
            begin = joined.pop()[0]
        joined.append((begin, end))
    return joined


def _assistant_spans(text: str, conversation: Conversation, tokenizer: Tokenizer, train_on: TrainOn) -> list[Span]:
    """Where the assistant speaks, for templates that do not mark it: from the prompt for an answer to the turn's end.

    The text up to an answer must be how the whole text begins; or else the answers themselves must be found in it.
    """
    turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    spans, found = [], None
    for number, i in list(enumerate(turns)) if train_on == "assistant" else [(-1, turns[-1])]:
        span = _turn(text, conversation, i, tokenizer)
        if span is None:
            found = found or _answers(text, conversation, tokenizer)
            if not found:
                advice = "; --train-on completion learns the last answer only" if train_on == "assistant" else ""
                raise DataError(
                    f"the chat template renders message {i}, or those before it, differently once others follow, or "
                    f"does not begin an answer as it asks for one, so its tokens cannot be found{advice}"
                )
            span = found[number]
        spans.append(span)
    return spans


def _turn(text: str, conversation: Conversation, i: int, tokenizer: Tokenizer) -> Span | None:
    """Where message i is in the text, which begins as the template renders the messages up to it; None if not so."""
    messages, tools = conversation.messages, conversation.tools
    try:
        through = tokenizer.render(messages[: i + 1], tools=tools)
        before = tokenizer.render(messages[: max(i, 1)], add_generation_prompt=True, tools=tools)
    except DataError:  # some templates refuse a conversation that breaks off
        return None
    if not text.startswith(through):  # phi3's closes the whole text, not the turn, with the end token
        through = through.removesuffix(tokenizer.special_tokens.get("eos_token", ""))
    if i == 0:  # no message comes before, but the header that asks for an answer stands in the turn
        header = before.removeprefix(through)
        before = through[: through.index(header) + len(header)] if header in through else before
    return (len(before), len(through)) if text.startswith(through) and through.startswith(before) else None


def _answers(text: str, conversation: Conversation, tokenizer: Tokenizer) -> list[Span] | None:
    """Every answer in the text, found by marks around what is written of it, with what closes it; None if that fails.

    Of an answer that is more than its content, tool calls say, the marks would miss the rest.
    """

    def pieces(messages: Sequence[Fields]) -> list[str]:
        return tokenizer.render(messages, tools=conversation.tools).replace(TO, FROM).split(FROM)

    messages, last = list(conversation.messages), 0
    for i, message in enumerate(conversation.messages):
        content = message.get("content")
        if message["role"] == "assistant":
            if not isinstance(content, str) or not content.strip() or _has_more(message):
                return None
            last = i
            for core in (content, content.strip()):  # many templates strip
                messages[i] = {**message, "content": content.replace(core, f"{FROM}{core}{TO}", 1)}
                if "".join(pieces(messages)) == text:
                    break
    found, closing = pieces(messages), pieces(messages[: last + 1])[-1]
    answers = sum(message["role"] == "assistant" for message in messages)
    is_whole = "".join(found) == text and len(found) == 2 * answers + 1
    if not (is_whole and all(after.startswith(closing) for after in found[2::2])):
        return None
    ends = list(accumulate(map(len, found)))
    return [(begin, end + len(closing)) for begin, end in zip(ends[0::2], ends[1::2], strict=False)]


def _has_more(answer: Fields) -> bool:
    return any(value for key, value in answer.items() if key not in ("role", "content", "name", "weight"))


def _labels(tokens: list[int], spans: list[Span], learned: list[Span]) -> list[int]:
    """A token is a label where it shares a character with a learned span."""
    return [
        token if any(end > first and begin < last for first, last in learned) and end > begin else IGNORE_INDEX
        for token, (begin, end) in zip(tokens, spans, strict=True)
    ]
