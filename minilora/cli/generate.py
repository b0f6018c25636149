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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from minilora.adapter import disable_adapter
from minilora.cli.columns import columns
from minilora.cli.command import INTERRUPTED, Options, say
from minilora.cli.flags import add_fields, from_flags
from minilora.cli.load import Loaded, add_model_flags, load
from minilora.cli.prompts import encode_prompts, read_prompts
from minilora.cli.write import Writing, add_writing_flags, write
from minilora.errors import ConfigError
from minilora.runs.config import option
from minilora.runs.formats import Fields
from minilora.runs.rows import Row


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
