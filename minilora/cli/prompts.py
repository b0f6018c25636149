"""What a model is asked: from flags, from standard input or from a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from minilora.cli.command import Options
from minilora.cli.load import Loaded
from minilora.errors import ConfigError, DataError
from minilora.models.tokenizer import Tokenizer
from minilora.runs.config import DataConfig
from minilora.runs.data import use_prompt_style
from minilora.runs.formats import PromptCompletion, parse_prompt
from minilora.runs.rows import Row, read_eval_rows
from minilora.storage import read_text

STDIN = "-"
Asking = Literal["chat", "plain", "raw"]


def read_prompts(options: Options) -> list[Row]:
    """The prompts as rows.

    Raises:
        ConfigError: there is no prompt, or one on standard input that is not UTF-8.
        DataError, FormatError: the file cannot be read.
    """
    if options["raw"] and options["system"] is not None:
        raise ConfigError("--system needs the chat template, which --raw leaves out")
    if options["prompts"] is not None:
        return _rows_of(options["prompts"])
    if not options["prompt"] and sys.stdin.isatty():
        raise ConfigError("give --prompt TEXT, --prompts FILE, or a prompt on standard input")
    texts = options["prompt"] or [STDIN]
    if texts.count(STDIN) > 1:
        raise ConfigError("standard input can be one prompt, not several")
    return [
        Row({"prompt": _standard_input()}, "standard input") if text == STDIN else Row({"prompt": text}, "--prompt")
        for text in texts
    ]


def encode_prompts(rows: Sequence[Row], loaded: Loaded, options: Options) -> list[list[int]]:
    """The token ids of prompts, asked as the flags say, else as the adapter was trained; errors as below."""
    tokenizer, training, system = loaded.tokenizer, loaded.training, options["system"]
    is_plain = training.is_plain and options["raw"] is None
    asking: Asking = "raw" if options["raw"] else "plain" if is_plain else "chat"
    if asking != "raw":
        tokenizer = use_prompt_style(tokenizer, "auto", rows)
        system = training.config.get("system") if system is None else system
    return [encode_prompt(row, tokenizer, system, asking) for row in rows]


def encode_prompt(row: Row, tokenizer: Tokenizer, system: str | None, asking: Asking) -> list[int]:
    """The token ids of a row's prompt: those that training learns its answer after.

    A `prompt` that is text and has no `completion` is a user's turn if asked by "chat", where there is a template.
    Control tokens act in a "raw" one; elsewhere they are plain text.

    Raises:
        DataError: the row has no prompt, or one that cannot be encoded.
    """
    try:
        if row.problem:
            raise DataError(row.problem)
        fields, text = row.fields, row.fields.get("prompt")
        if isinstance(text, str) and asking == "chat" and tokenizer.template and fields.get("completion") is None:
            fields = {**fields, "prompt": [{"role": "user", "content": text}]}
        parsed = parse_prompt(fields, DataConfig(system=system))
        json.dumps(row.fields, ensure_ascii=False).encode()
        if isinstance(parsed, PromptCompletion):
            ids = _encode_beginning(parsed.prompt if asking == "raw" else tokenizer.quote(parsed.prompt), tokenizer)
        elif asking == "raw":
            raise DataError("a conversation needs the chat template, which --raw leaves out")
        else:
            ids = tokenizer.encode_chat(parsed.messages, add_generation_prompt=True, tools=parsed.tools)
    except DataError as error:
        raise DataError(f"{row.source}: {error}") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{row.source}: the row holds {error.object[error.start]!r}, which no UTF-8 is") from error
    if not ids:
        raise DataError(f"{row.source}: the prompt is empty")
    return ids


def _rows_of(name: str) -> list[Row]:
    return _lines_of(Path(name)) if name.endswith(".txt") else read_eval_rows(name)


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


def _encode_beginning(text: str, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a text that goes on: without those that the tokenizer closes a text with."""
    ids, spans = tokenizer.encode_spans(text)
    while len(ids) > 1 and spans[len(ids) - 1][0] == spans[len(ids) - 1][1]:
        ids.pop()
    return ids
