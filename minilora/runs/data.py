"""Rows of data become token ids and labels.

What is learned is marked in the characters of the text and carried over to tokens by their offsets: counting the
tokens of the prompt alone would be wrong wherever a token spans the seam.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import overload

from minilora.errors import ConfigError, DataError
from minilora.models.ops import IGNORE_INDEX
from minilora.models.tokenizer import Tokenizer
from minilora.runs.config import DataConfig, TrainOn
from minilora.runs.formats import Conversation, Passage, understand
from minilora.runs.rows import Row, read_training_rows
from minilora.runs.turns import Span, written
from minilora.storage import ASSETS, read_text


@dataclass(frozen=True)
class Example:
    """One row as the model sees it. `labels[i]` is `tokens[i]` where that token is learned, else IGNORE_INDEX.

    A label is predicted `shift` tokens before its own: text from the token before it. A class is at the token that it
    is read from: there `labels[i]` is a class, and `shift` is 0.
    """

    tokens: list[int]
    labels: list[int]
    source: str = ""
    shift: int = 1

    @property
    def labelled(self) -> int:
        """How many labels are learned. The first token is never predicted, so as text it does not count."""
        return sum(label != IGNORE_INDEX for label in self.labels[self.shift :])

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
    rows = read_training_rows(path)
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

    def encode(row: Row) -> tuple[Example, bool, bool]:
        meaning, is_quoted = _read(row, tokenizer, config)
        example = _encoded(meaning, row.source, tokenizer, config.train_on)
        return example, isinstance(meaning, Conversation), is_quoted

    return gather(rows, encode, config)


def gather(rows: Sequence[Row], encode: Callable[[Row], tuple[Example, bool, bool]], config: DataConfig) -> Dataset:
    """The rows, encoded and cut; `encode` gives the example, and whether it is a conversation, and is quoted.

    Raises:
        DataError: as of `encode_rows`.
    """
    examples, bad, conversations, quoted = [], [], 0, 0
    for row in rows:
        try:
            example, is_conversation, is_quoted = encode(row)
        except DataError as error:
            if not config.skip_bad_rows:
                raise
            bad.append(str(error))
        else:
            examples.append(example)
            conversations += is_conversation
            quoted += is_quoted
    limit = config.max_length
    cut = [replace(e, tokens=e.tokens[:limit], labels=e.labels[:limit]) for e in examples]
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
    with located(row.source):
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
    with located(source):
        if isinstance(meaning, Passage):
            tokens, labels = _encode_passage(meaning, tokenizer, train_on)
        else:
            tokens, labels = _encode_conversation(meaning, tokenizer, train_on)
        example = Example(tokens, labels, source)
        if not example.labelled:
            raise DataError("nothing to learn: no token of an answer can be predicted")
        return example


@contextmanager
def located(source: str) -> Iterator[None]:
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
    text, learned = written(conversation, tokenizer, train_on)
    tokens, spans = tokenizer.encode_spans(text, add_special_tokens=False)
    return tokens, _labels(tokens, spans, learned)


def _labels(tokens: list[int], spans: list[Span], learned: list[Span]) -> list[int]:
    """A token is a label where it shares a character with a learned span."""
    return [
        token if any(end > first and begin < last for first, last in learned) and end > begin else IGNORE_INDEX
        for token, (begin, end) in zip(tokens, spans, strict=True)
    ]
