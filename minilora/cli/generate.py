"""Generate text from prompts.

Each prompt is a user's message in the chat template; a model without one
continues the prompt. A single answer is printed while it is generated.

Example:
  minilora generate --adapter run --prompt "Hello" --compare-base
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from minilora.adapter import disable_adapter
from minilora.cli import Options, Parser, streaming
from minilora.cli.flags import add_fields, from_flags
from minilora.cli.load import THINKING, add_model_flags, load, run_settings, thinking_of
from minilora.errors import ConfigError, DataError
from minilora.files import read_text
from minilora.llama import Llama
from minilora.models.tokenizer import Tokenizer
from minilora.runs.encoders import encode_prompt, with_prompt_style
from minilora.runs.formats import Row
from minilora.runs.inputs import files_to_evaluate
from minilora.runs.rows import stream_rows
from minilora.runs.settings import DataConfig


def add_flags(parser: Parser) -> None:
    add_model_flags(parser)
    group = parser.group("prompts")
    one_of = group.add_mutually_exclusive_group()
    one_of.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a prompt; repeat the flag for several; without --prompt and --prompts, standard input is the prompt",
    )
    one_of.add_argument(
        "--prompts",
        metavar="FILE",
        help="a file of prompts: a .txt with one per line, or rows as in training, whose answers are ignored; a row "
        "with only a `prompt` is treated like --prompt",
    )
    others = {field.name for field in fields(DataConfig)} - {"columns"}
    add_fields(parser, DataConfig, "prompts", others, unset="as in the adapter's run")
    group.add_argument(
        "--system", metavar="TEXT", help="system prompt for prompts without one (default: that of the training)"
    )
    group.add_argument("--thinking", **THINKING)
    group.add_argument(
        "--raw",
        action=argparse.BooleanOptionalAction,
        help="continue the prompt as it is, without the chat template, and read control tokens in it as tokens "
        "(default: as in the adapter's training, otherwise with the template if the model has one)",
    )
    streaming.add_generation_flags(parser, max_new_tokens=64)
    add = parser.group("output").add_argument
    add("--compare-base", action="store_true", help="also generate without the adapter, and print that text first")
    add(
        "--json",
        action="store_true",
        help="print a JSON object per line, as --prompts and several --prompt always do: the prompt's row, `text`, "
        "`finish_reason` (stop, or length if it was cut), and with --compare-base `base` and `base_finish_reason`",
    )


def run(options: Options) -> int:
    generation = from_flags(streaming.GenerationConfig, options)
    adapter = "".join(options["adapter"])
    if options["compare_base"] and not adapter:
        raise ConfigError("--compare-base needs --adapter")
    rows = rows_of_flags(options)
    model, tokenizer = load(options)
    prompts = encode_prompts(rows, tokenizer, options)
    titles = {"base": "--- base\n", "text": f"--- {adapter}\n"} if options["compare_base"] else {"text": ""}
    as_json = options["json"] or options["prompts"] is not None or len(rows) > 1
    for begin in range(0, len(rows), streaming.BATCH_SIZE):
        batch = prompts[begin : begin + streaming.BATCH_SIZE]
        seeded = replace(generation, seed=generation.seed + begin)
        answers = [row.fields for row in rows[begin : begin + streaming.BATCH_SIZE]]
        for key, title in titles.items():
            write = streaming.generate_text if as_json else partial(_show, title)
            with disable_adapter(model) if key == "base" else nullcontext():
                written = write(model, tokenizer, batch, seeded)
            reason = "finish_reason" if key == "text" else f"{key}_finish_reason"
            texts = [{key: text.text, reason: text.finish_reason} for text in written]
            answers = [answer | text for answer, text in zip(answers, texts, strict=True)]
        for answer in answers if as_json else ():
            print(json.dumps(answer, ensure_ascii=False), flush=True)
    return 0


def rows_of_flags(options: Options) -> list[Row]:
    """Read the prompts as rows."""
    file = options["prompts"]
    if options["prompt"]:
        return [Row({"prompt": text}, "--prompt") for text in options["prompt"]]
    if file is None and sys.stdin.isatty():
        raise ConfigError("give --prompt TEXT, --prompts FILE, or a prompt on standard input")
    if file is None:
        return [Row({"prompt": sys.stdin.read().removesuffix("\n")}, "standard input")]
    if not file.endswith(".txt"):
        columns = run_settings(options).get("columns")
        trained = columns if isinstance(columns, dict) else {}
        asked = {name: column for name, column in trained.items() if name not in ("output", "completion")}
        return list(stream_rows(*files_to_evaluate(file), columns=options["columns"] or asked or None))
    lines = read_text(Path(file), is_named=True).removeprefix("\ufeff").split("\n")
    rows = [Row({"prompt": line}, f"{file}:{i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise DataError(f"{file}: there are no prompts")
    return rows


def encode_prompts(rows: Sequence[Row], tokenizer: Tokenizer, options: Options) -> list[list[int]]:
    """Return the token ids of the prompts, in the form that the flags ask for, or else that of the training."""
    form, system = tokenizer.prompts.form, options["system"]
    if options["raw"] is not None:
        form = "raw" if options["raw"] else "template"
    if system is None and form != "raw":
        system = tokenizer.prompts.system
    tokenizer = with_prompt_style(tokenizer, "auto", rows)
    thinking = thinking_of(options, tokenizer)
    return [encode_prompt(row, tokenizer, system, form, thinking) for row in rows]


def _show(
    title: str, model: Llama, tokenizer: Tokenizer, prompts: list[list[int]], generation: streaming.GenerationConfig
) -> list[streaming.Completion]:
    """Print the text of one prompt while it is generated, after a title."""
    print(title, end="")
    (written,) = streaming.generate_text(model, tokenizer, prompts, generation, partial(print, end="", flush=True))
    print(flush=True)
    streaming.say_cut(written, generation.max_new_tokens)
    return [written]
