"""Answer prompts, each a user's turn of the chat template.

A model without a template continues them. A single text is shown as it is
written.

Example:
  minilora generate --adapter run --prompt "Hello" --compare-base
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from minilora.adapter import disable_adapter
from minilora.cli import INTERRUPTED, Options, say
from minilora.cli.columns import columns
from minilora.cli.flags import add_fields, from_flags
from minilora.cli.load import Loaded, add_model_flags, load
from minilora.cli.write import Writing, add_writing_flags, write
from minilora.errors import ConfigError, DataError, option
from minilora.models.tokenizer import Tokenizer
from minilora.runs.config import DataConfig
from minilora.runs.data import use_prompt_style
from minilora.runs.formats import Fields, PromptCompletion, parse_prompt
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


@dataclass(frozen=True)
class Output:
    """Which texts are written, and how they are printed."""

    samples: int = option(1, "texts for each prompt")
    compare_base: bool = option(False, "show what the base model writes, left, beside the adapter's")
    json: bool = option(
        False,
        "print a JSON object a line, as --prompts and several --prompt always do: the prompt's row and `text`; "
        "`sample`, from 1, with --samples, and `base` with --compare-base",
    )
    batch_size: int = option(8, "texts written at a time; in float32 it does not change them")

    def __post_init__(self) -> None:
        counts = {"samples": self.samples, "batch_size": self.batch_size}
        if bad := [f"{name} is {value}" for name, value in counts.items() if value < 1]:
            raise ConfigError(f"{', '.join(bad)}, need at least 1")


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    add_prompt_flags(parser)
    add_writing_flags(parser, max_new_tokens=64)
    add_fields(parser, Output, "output")


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
        help=".txt: a prompt a line; else rows as in training, of which an answer is left out; a `prompt` of text "
        "needs no `completion`, and without one it is asked as --prompt is",
    )
    group.add_argument("--system", metavar="TEXT", help="system prompt of conversations that have none")
    group.add_argument(
        "--raw",
        action=argparse.BooleanOptionalAction,
        help="continue the prompt as it is, without the chat template, control tokens acting "
        "(default: as the adapter's rows were written; else by the template, if there is one)",
    )


def run(options: Options) -> int:
    output, writing = from_flags(Output, options), from_flags(Writing, options)
    if output.compare_base and not options["adapter"]:
        raise ConfigError("--compare-base needs --adapter")
    if output.samples > 1 and writing.temperature == 0:
        say("at temperature 0 all samples of a prompt are the same; --temperature 0.8 makes them differ")
    rows = read_prompts(options)
    loaded = load(options)
    prompts = encode_prompts(rows, loaded, options)
    is_json = output.json or options["prompts"] is not None or len(rows) > 1
    try:
        if is_json or output.compare_base or output.samples > 1:
            for answer in _answers(loaded, rows, prompts, writing, output):
                text = (
                    json.dumps(answer, ensure_ascii=False) if is_json else _as_text(answer, output, options["adapter"])
                )
                print(text, flush=True)
        else:
            texts = write(loaded.model, loaded.tokenizer, prompts, writing, _show)
            print()
            if not any(texts):
                say("(the model ended at once)")
    except KeyboardInterrupt:
        print()
        return INTERRUPTED
    return 0


def _answers(
    loaded: Loaded, rows: Sequence[Row], prompts: Sequence[list[int]], writing: Writing, output: Output
) -> Iterator[Fields]:
    """The rows with what was written for them: all samples of the first, then of the next, in batches.

    The n-th text has a seed of its own, `seed` + n.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    asked = [(row, ids, n) for row, ids in zip(rows, prompts, strict=True) for n in range(1, output.samples + 1)]
    for begin in range(0, len(asked), output.batch_size):
        part = asked[begin : begin + output.batch_size]
        batch = [ids for _, ids, _ in part], replace(writing, seed=writing.seed + begin)
        answers = [row.fields | ({"sample": n} if output.samples > 1 else {}) for row, _, n in part]
        if output.compare_base:
            with disable_adapter(model):
                bases = write(model, tokenizer, *batch)
            answers = [{**answer, "base": base} for answer, base in zip(answers, bases, strict=True)]
        for answer, text in zip(answers, write(model, tokenizer, *batch), strict=True):
            yield {**answer, "text": text}


def _as_text(answer: Fields, output: Output, adapter: str) -> str:
    """The text, under its number if it is one of several, or in a column beside the base model's."""
    number = f"--- sample {answer['sample']} of {output.samples}\n" if output.samples > 1 else ""
    if not output.compare_base:
        return f"{number}{answer['text']}"
    width = shutil.get_terminal_size().columns
    return number + columns(answer["base"], answer["text"], ("base", adapter), width)


def _show(piece: str) -> None:
    print(piece, end="", flush=True)
