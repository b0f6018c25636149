"""Rows of a data file become token ids and labels.

Three shapes of row are recognised, each row by itself:

    {"prompt": …, "completion": …}               plain text; the completion is closed by the model's end token
    {"instruction": …, "input": …, "output": …}  alpaca; a conversation where the model has a chat template
    {"messages": [{"role": …, "content": …}, …]} a conversation, rendered by the model's chat template

What is learned is marked in the characters of the text and carried over to tokens by their offsets: counting the
tokens of the prompt alone would be wrong wherever a token spans the seam.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, overload

from minilora.errors import DataError
from minilora.model.ops import IGNORE_INDEX
from minilora.model.tokenizer import Tokenizer
from minilora.storage import ASSETS, BUILTIN, read_text
from minilora.train.config import TrainOn

Span = tuple[int, int]
ALPACA_PROMPT = (
    "Below is an instruction that describes a task{context}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


@dataclass(frozen=True)
class Row:
    """One row as it was read, and where: "file:line"."""

    fields: dict[str, Any]
    source: str


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

    `truncated` rows were cut to `max_length`; `unlabelled` ones had no label left after that and are not in.
    """

    examples: tuple[Example, ...]
    truncated: int = 0
    unlabelled: int = 0

    def __repr__(self) -> str:
        tokens = sum(len(example.tokens) for example in self.examples)
        return f"Dataset({len(self)} rows, {tokens} tokens, {self.truncated} truncated, {self.unlabelled} unlabelled)"

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> Example | Dataset:
        return Dataset(self.examples[index]) if isinstance(index, slice) else self.examples[index]


def load_dataset(
    path: str | Path, tokenizer: Tokenizer, train_on: TrainOn = "completion", max_length: int = 1024
) -> Dataset:
    """Read a .json or .jsonl file and encode its rows.

    Raises:
        DataError: a row that cannot be used, with file and line; a file without rows.
    """
    return encode_rows(read_rows(Path(path)), tokenizer, train_on, max_length)


def find_splits(name_or_path: str | Path) -> dict[str, Path]:
    """The files of a data set by split: a directory's `train`, `valid` and `test` (.jsonl or .json); a file is "train".

    Raises:
        DataError: no such file or directory, or a directory without any of these files.
    """
    path = ASSETS / "data" if str(name_or_path) == BUILTIN else Path(name_or_path)
    if path.is_file():
        return {"train": path}
    if not path.exists():
        raise DataError(f"{path}: no such file or directory")
    names = [
        (split, path / f"{split}{ending}") for split in ("train", "valid", "test") for ending in (".jsonl", ".json")
    ]
    found = {split: file for split, file in reversed(names) if file.is_file()}
    if not found:
        raise DataError(f"{path}: need a .json or .jsonl file, or a directory with train.jsonl (and valid, test)")
    return found


def read_rows(path: Path) -> list[Row]:
    """The rows of a file: a JSON array of objects, or one object a line.

    Raises:
        DataError: something is not a JSON object, with file and line; there are no rows.
    """
    text = read_text(path)
    pieces = _array(text, path) if text.lstrip().startswith("[") else _lines(text, path)
    rows = []
    for line, value in pieces:
        if not isinstance(value, dict):
            raise DataError(f"{path}:{line}: found a JSON {type(value).__name__}, need an object")
        rows.append(Row(value, f"{path}:{line}"))
    if not rows:
        raise DataError(f"{path}: there are no rows")
    return rows


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer, train_on: TrainOn, max_length: int) -> Dataset:
    """Tokens and labels of every row.

    Raises:
        DataError: a row that cannot be used; no row has a label left.
    """
    if max_length < 1:
        raise DataError(f"max_length is {max_length}, need at least 1")
    whole = [encode_row(row, tokenizer, train_on) for row in rows]
    cut = [Example(e.tokens[:max_length], e.labels[:max_length], e.source) for e in whole]
    kept = tuple(example for example in cut if example.labelled)
    if not kept:
        raise DataError(f"{rows[0].source}: no row of {len(rows)} has a label within its first {max_length} tokens")
    return Dataset(kept, sum(len(e.tokens) > max_length for e in whole), len(cut) - len(kept))


def encode_row(row: Row, tokenizer: Tokenizer, train_on: TrainOn) -> Example:
    """Tokens and labels of one row, uncut.

    Raises:
        DataError: the row has none of the known shapes, a field of the wrong type, or nothing to learn.
    """
    try:
        example = _encode(row.fields, tokenizer, train_on)
    except DataError as error:
        raise DataError(f"{row.source}: {error}") from error
    if not example.labelled:
        raise DataError(f"{row.source}: nothing to learn: no answer, or an empty one")
    return Example(example.tokens, example.labels, row.source)


def _encode(fields: dict[str, Any], tokenizer: Tokenizer, train_on: TrainOn) -> Example:
    if "messages" in fields:
        return _encode_conversation(_messages(fields), fields.get("tools"), tokenizer, train_on)
    if "instruction" in fields and "output" in fields:
        instruction, extra, output = _text(fields, "instruction"), _text(fields, "input", ""), _text(fields, "output")
        if tokenizer.template is None:
            return _encode_text(_alpaca_prompt(instruction, extra), output, tokenizer, train_on)
        question = f"{instruction}\n\n{extra}" if extra else instruction
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
        return _encode_conversation(messages, None, tokenizer, train_on) if output else Example([], [])
    if "prompt" in fields and "completion" in fields:
        return _encode_text(_text(fields, "prompt"), _text(fields, "completion"), tokenizer, train_on)
    raise DataError(
        f"keys {sorted(fields)} are of no known shape; known are prompt and completion, "
        "instruction (with input) and output, and messages"
    )


def _encode_text(prompt: str, completion: str, tokenizer: Tokenizer, train_on: TrainOn) -> Example:
    """Prompt and completion as one text, closed by the end token, which is always a label if anything is."""
    if not completion:
        return Example([], [])
    tokens, spans = _encode_spans(prompt + completion, tokenizer)
    learned = [(0 if train_on == "all" else len(prompt), len(prompt + completion))]
    labels = _labels(tokens, spans, learned)
    if tokenizer.eos_id is not None:
        if tokens[-1] != tokenizer.eos_id:
            tokens, labels = [*tokens, tokenizer.eos_id], [*labels, tokenizer.eos_id]
        labels[-1] = tokenizer.eos_id
    return Example(tokens, labels)


def _encode_conversation(
    messages: Sequence[dict[str, Any]], tools: Any, tokenizer: Tokenizer, train_on: TrainOn
) -> Example:
    if tokenizer.template is None:
        raise DataError(
            "a conversation needs a chat template, and the model has none: "
            "take an instruct model, or rows of prompt and completion"
        )
    text, learned = tokenizer.template.render_spans(messages, tools=tools)
    if train_on == "all":
        learned = [(0, len(text))]
    else:
        learned = _joined(learned) or _assistant_spans(text, messages, tools, tokenizer, train_on)
        learned = learned if train_on == "assistant" else learned[-1:]
    tokens, spans = _encode_spans(text, tokenizer, add_special_tokens=False)
    return Example(tokens, _labels(tokens, spans, learned))


def _joined(spans: list[Span]) -> list[Span]:
    """Spans that touch as one: a template may mark an answer and its closing token apart."""
    joined: list[Span] = []
    for begin, end in spans:
        if joined and joined[-1][1] == begin:
            begin = joined.pop()[0]
        joined.append((begin, end))
    return joined


def _assistant_spans(
    text: str, messages: Sequence[dict[str, Any]], tools: Any, tokenizer: Tokenizer, train_on: TrainOn
) -> list[Span]:
    """Where the assistant speaks, for templates that do not mark it: from the prompt for an answer to the turn's end.

    The text up to message i must be how the whole text begins, or the turns cannot be told apart.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = []
    for i in turns if train_on == "assistant" else turns[-1:]:
        through = tokenizer.render(messages[: i + 1], tools=tools)
        before = tokenizer.render(messages[: max(i, 1)], add_generation_prompt=True, tools=tools)
        if i == 0:  # no message comes before, but the header that asks for an answer stands in the turn
            header = before.removeprefix(through)
            before = through[: through.index(header) + len(header)] if header in through else before
        if not (text.startswith(through) and through.startswith(before)):
            raise DataError(
                f"the chat template renders message {i} differently once others follow, so its tokens cannot be found; "
                "--train-on completion learns the last answer only"
            )
        spans.append((len(before), len(through)))
    return spans


def _encode_spans(text: str, tokenizer: Tokenizer, add_special_tokens: bool = True) -> tuple[list[int], list[Span]]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{text[error.start]!r} is half of a surrogate pair, which is no character") from error
    return tokenizer.encode_spans(text, add_special_tokens)


def _labels(tokens: list[int], spans: list[Span], learned: list[Span]) -> list[int]:
    """A token is a label where it shares a character with a learned span."""
    return [
        token if any(end > first and begin < last for first, last in learned) and end > begin else IGNORE_INDEX
        for token, (begin, end) in zip(tokens, spans, strict=True)
    ]


def _messages(fields: dict[str, Any]) -> list[dict[str, Any]]:
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"messages: found {messages!r:.60}, need a list of messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"messages[{i}]: found {message!r:.60}, need an object with role and content")
        if message["role"] == "assistant" and not message.get("content") and not message.get("tool_calls"):
            raise DataError(f"messages[{i}]: nothing to learn: the answer is empty")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("messages: no message has role 'assistant', so there is nothing to learn")
    return messages


def _text(fields: dict[str, Any], key: str, default: str | None = None) -> str:
    value = fields.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise DataError(f"{key}: found {value!r:.60}, need text")
    return value


def _alpaca_prompt(instruction: str, extra: str) -> str:
    """The text of Taori et al. 2023, Stanford Alpaca."""
    context = ", paired with an input that provides further context" if extra else ""
    return ALPACA_PROMPT.format(
        context=context, instruction=instruction, input=f"### Input:\n{extra}\n\n" if extra else ""
    )


def _lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # also for numbers of more digits than Python reads
                raise DataError(f"{path}:{number}: not JSON ({error})") from error


def _array(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON array, each with the line that it begins on."""
    decoder, position, white = json.JSONDecoder(), text.index("[") + 1, " \t\r\n"
    line, counted, separators = 1, 0, 0
    while True:
        begin = position
        while position < len(text) and text[position] in white + ",":
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        is_end = text[position : position + 1] == "]" and not text[position + 1 :].strip()
        if text.count(",", begin, position) != (0 if is_end else separators):
            raise DataError(f"{path}:{line}: not JSON (before this, a comma or bracket is missing or one too many)")
        if is_end:
            return
        separators = 1
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:  # also for numbers of more digits than Python reads
            raise DataError(f"{path}:{line}: not JSON ({error})") from error
        yield line, value
