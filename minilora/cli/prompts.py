"""What a model is asked: from flags, from standard input or from a file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minilora.cli.command import Options, adapters
from minilora.errors import ConfigError, DataError
from minilora.hub import fetch
from minilora.model.tokenizer import Tokenizer
from minilora.storage import read_json, read_text
from minilora.train.rows import Row, find_splits, read_rows

STDIN = "-"
Messages = list[Any]
Asking = Literal["chat", "plain", "raw"]


@dataclass(frozen=True)
class Prompt:
    """A row as it was given, and the token ids that the model continues."""

    fields: dict[str, Any]
    ids: list[int]


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """--prompt, --prompts, --system and --raw."""
    group = parser.add_argument_group("prompts")
    one_of = group.add_mutually_exclusive_group()
    one_of.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="what to answer or, if the model has no chat template, to continue; give it again for more; "
        "-: all of standard input, which is also read where no prompt is given and it is no terminal",
    )
    one_of.add_argument(
        "--prompts",
        metavar="FILE",
        help=".txt: a prompt a line; .jsonl or .json: rows with `prompt` (text or messages) or `messages`, "
        "of which a last one by the assistant is left out",
    )
    group.add_argument("--system", metavar="TEXT", help="system prompt of conversations that have none")
    group.add_argument(
        "--raw",
        action=argparse.BooleanOptionalAction,
        help="continue the prompt as it is, without the chat template, control tokens acting "
        "(default: as the adapter's rows were written; else by the template, if there is one)",
    )


def read_prompts(options: Options) -> list[Row]:
    """The prompts as rows that have a field `prompt` or `messages`.

    Raises:
        ConfigError: there is no prompt, or one on standard input that is not UTF-8.
        DataError, FormatError: the file cannot be read.
    """
    if options["raw"] and options["system"] is not None:
        raise ConfigError("--system needs the chat template, which --raw leaves out")
    if options["prompts"] is not None:
        return list(_rows_of(options["prompts"]))
    if not options["prompt"] and sys.stdin.isatty():
        raise ConfigError("give --prompt TEXT, --prompts FILE, or a prompt on standard input")
    texts = options["prompt"] or [STDIN]
    if texts.count(STDIN) > 1:
        raise ConfigError("standard input can be one prompt, not several")
    return [
        Row({"prompt": _standard_input()}, "standard input") if text == STDIN else Row({"prompt": text}, "--prompt")
        for text in texts
    ]


def how_to_ask(options: Options) -> Asking:
    """As --raw or --no-raw says; else as the adapter was trained, which the run.json beside it knows."""
    if options["raw"] is not None:
        return "raw" if options["raw"] else "chat"
    runs = [fetch(path, "adapter") / "run.json" for path in adapters(options)]
    was_plain = [read_json(run).get("prompts") == "plain" for run in runs if run.is_file()]
    return "plain" if any(was_plain) else "chat"


def encode_prompt(row: Row, tokenizer: Tokenizer, system: str | None, asking: Asking) -> Prompt:
    """The token ids of a row's prompt. Control tokens act in a raw one; elsewhere they are plain text.

    Raises:
        DataError: the row has no prompt, or one that cannot be encoded.
    """
    try:
        prompt = _prompt(row)
        json.dumps([row.fields, system], ensure_ascii=False).encode()
        if isinstance(prompt, str) and (asking != "chat" or tokenizer.template is None):
            if system is not None:
                raise DataError("--system needs a chat template, and the model or adapter is asked without one")
            ids = _encode_beginning(prompt if asking == "raw" else tokenizer.quote(prompt), tokenizer)
        elif asking == "raw":
            raise DataError("messages need the chat template, which --raw leaves out")
        else:
            ids = tokenizer.encode_chat(_messages(prompt, system), add_generation_prompt=True)
    except DataError as error:
        raise DataError(f"{row.source}: {error}") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{row.source}: the text holds {error.object[error.start]!r}, which no UTF-8 is") from error
    if not ids:
        raise DataError(f"{row.source}: the prompt is empty")
    return Prompt(row.fields, ids)


def _rows_of(name: str) -> Iterator[Row]:
    if name.endswith(".txt"):
        yield from _lines_of(Path(name))
        return
    files = find_splits(name)
    for path in next(files[split] for split in ("test", "valid", "train") if split in files):
        yield from read_rows(path)


def _lines_of(path: Path) -> list[Row]:
    lines = read_text(path).removeprefix("\ufeff").split("\n")
    rows = [Row({"prompt": line}, f"{path}:{i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise DataError(f"{path}: there are no prompts")
    return rows


def _standard_input() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input: {error.object[error.start]:#04x} is not UTF-8") from error


def _prompt(row: Row) -> str | Messages:
    if row.problem:
        raise DataError(row.problem)
    prompt = row.fields.get("messages", row.fields.get("prompt"))
    if not isinstance(prompt, str | list):
        raise DataError(f"need `prompt`, text or messages, or `messages`; found {sorted(row.fields)}")
    return prompt


def _messages(prompt: str | Messages, system: str | None) -> Messages:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for i, message in enumerate(messages):
        if not (isinstance(message, dict) and isinstance(message.get("content"), str | list | None)):
            raise DataError(f"message {i}: found {message!r:.60}, need an object with role and content, text or parts")
    roles = [message.get("role") for message in messages]
    if roles[-1:] == ["assistant"]:
        messages = messages[:-1]
    if system is not None and roles[:1] not in (["system"], ["developer"]):
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _encode_beginning(text: str, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a text that goes on: without those that the tokenizer closes a text with."""
    ids, spans = tokenizer.encode_spans(text)
    while len(ids) > 1 and spans[len(ids) - 1][0] == spans[len(ids) - 1][1]:
        ids.pop()
    return ids
