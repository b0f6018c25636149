"""Generate text from prompts.

Each prompt is a user's message in the chat template; a model without one
continues the prompt. A single answer is printed while it is generated.

Example:
  minilora generate --adapter run --prompt "Hello" --compare-base
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from minilora.adapter import disable_adapter
from minilora.cli import Options, Parser, say
from minilora.cli.flags import add_fields, from_flags
from minilora.cli.load import add_model_flags, load
from minilora.cli.write import GenerationConfig, add_generation_flags, generate_text
from minilora.errors import ConfigError, DataError, option
from minilora.files import read_text
from minilora.llama import Llama
from minilora.models.tokenizer import Tokenizer
from minilora.runs.config import DataConfig
from minilora.runs.conversations import encode_question
from minilora.runs.encoders import use_prompt_style
from minilora.runs.formats import Fields, PromptCompletion, Row, parse_prompt
from minilora.runs.inputs import read_eval_rows

STDIN = "-"
BATCH_SIZE = 8  # texts that are generated at a time
Mode = Literal["chat", "plain", "raw"]


@dataclass(frozen=True)
class Output:
    """How many texts are generated, and how they are printed."""

    samples: int = option(1, "number of texts to generate for each prompt")
    compare_base: bool = option(False, "also generate without the adapter, and print that text first")
    json: bool = option(
        False,
        "print one JSON object per line, as --prompts and several --prompt always do: the prompt's row and `text`; "
        "with --samples also `sample`, from 1, and with --compare-base `base`",
    )

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"samples is {self.samples}, need at least 1")


def add_flags(parser: Parser) -> None:
    add_model_flags(parser)
    group = parser.add_argument_group("prompts")
    one_of = group.add_mutually_exclusive_group()
    one_of.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a prompt; repeat the flag for several; -: read standard input, as is done without --prompt and --prompts",
    )
    one_of.add_argument(
        "--prompts",
        metavar="FILE",
        help="a file of prompts: .txt with one a line, otherwise rows as in training, whose answers are ignored; a row "
        "with only a `prompt` is treated like --prompt",
    )
    group.add_argument("--system", metavar="TEXT", help="system prompt of conversations that have none")
    group.add_argument(
        "--raw",
        action=argparse.BooleanOptionalAction,
        help="continue the prompt without the chat template, and let control tokens in it act as such "
        "(default: as in the adapter's training, otherwise with the template if the model has one)",
    )
    add_generation_flags(parser, max_new_tokens=64)
    add_fields(parser, Output, "output")


def run(options: Options) -> int:
    output, generation = from_flags(Output, options), from_flags(GenerationConfig, options)
    if output.compare_base and not options["adapter"]:
        raise ConfigError("--compare-base needs --adapter")
    if output.samples > 1 and generation.temperature == 0:
        say("at temperature 0 all samples of a prompt are the same; use a --temperature above 0")
    rows = read_prompts(options)
    model, tokenizer = load(options)
    prompts = encode_prompts(rows, tokenizer, options)
    is_json = output.json or options["prompts"] is not None or len(rows) > 1
    if is_json or output.compare_base or output.samples > 1:
        for answer in _answers(model, tokenizer, rows, prompts, generation, output):
            line = json.dumps(answer, ensure_ascii=False) if is_json else _as_text(answer, output, *options["adapter"])
            print(line, flush=True)
        return 0
    try:
        generate_text(model, tokenizer, prompts, generation, partial(print, end="", flush=True))
    except KeyboardInterrupt:
        print()
        raise
    print()
    return 0


def read_prompts(options: Options) -> list[Row]:
    """Read the prompts as rows.

    Raises:
        ConfigError: there is no prompt.
        DataError, FormatError: the file cannot be read.
    """
    if options["raw"] and options["system"] is not None:
        raise ConfigError("--system needs the chat template, which --raw leaves out")
    if options["prompts"] is not None:
        is_text = options["prompts"].endswith(".txt")
        return _read_lines(Path(options["prompts"])) if is_text else read_eval_rows(options["prompts"])
    if not options["prompt"] and sys.stdin.isatty():
        raise ConfigError("give --prompt TEXT, --prompts FILE, or a prompt on standard input")
    texts = options["prompt"] or [STDIN]
    stdin = sys.stdin.read().removesuffix("\n") if STDIN in texts else ""
    return [Row({"prompt": stdin}, "standard input") if t == STDIN else Row({"prompt": t}, "--prompt") for t in texts]


def _read_lines(path: Path) -> list[Row]:
    lines = read_text(path, is_named=True).removeprefix("\ufeff").split("\n")
    rows = [Row({"prompt": line}, f"{path}:{i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise DataError(f"{path}: there are no prompts")
    return rows


def encode_prompts(rows: Sequence[Row], tokenizer: Tokenizer, options: Options) -> list[list[int]]:
    """Return the token ids of the prompts, in the form that the flags ask for, or else that of the training."""
    if options["raw"]:
        return [encode_prompt(row, tokenizer, None, "raw") for row in rows]
    is_plain = tokenizer.prompts.form == "plain" and options["raw"] is None
    mode: Mode = "plain" if is_plain else "chat"
    system = tokenizer.prompts.system if options["system"] is None else options["system"]
    tokenizer = use_prompt_style(tokenizer, "auto", rows)
    return [encode_prompt(row, tokenizer, system, mode) for row in rows]


def encode_prompt(row: Row, tokenizer: Tokenizer, system: str | None, mode: Mode) -> list[int]:
    """Return the token ids of a row's prompt, the same that training has before the answer.

    Args:
        row: the row, whose answer is ignored.
        tokenizer: with the chat template.
        system: the system prompt of conversations that have none.
        mode: "chat" makes a `prompt` that is text and has no `completion` a user's message, if there is a template; in
            "raw" control tokens in the text act as such, otherwise they are text.

    Raises:
        DataError: the row has no prompt, or one that cannot be encoded.
    """
    try:
        if row.problem:
            raise DataError(row.problem)
        fields, text = row.fields, row.fields.get("prompt")
        if isinstance(text, str) and mode == "chat" and tokenizer.template and fields.get("completion") is None:
            fields = {**fields, "prompt": [{"role": "user", "content": text}]}
        parsed = parse_prompt(fields, DataConfig(system=system))
        if isinstance(parsed, PromptCompletion):
            ids = _encode_text(parsed.prompt if mode == "raw" else tokenizer.quote(parsed.prompt), tokenizer)
        elif mode == "raw":
            raise DataError("a conversation needs the chat template, which --raw leaves out")
        else:
            ids = encode_question(parsed, tokenizer)
        if not ids:
            raise DataError("the prompt is empty")
    except DataError as error:
        raise DataError(f"{row.source}: {error}") from error
    return ids


def _encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of a text, without those that the tokenizer adds at its end."""
    ids, spans = tokenizer.encode_spans(text)
    while len(ids) > 1 and spans[len(ids) - 1][0] == spans[len(ids) - 1][1]:
        ids.pop()
    return ids


def _answers(
    model: Llama,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    prompts: Sequence[list[int]],
    generation: GenerationConfig,
    output: Output,
) -> Iterator[Fields]:
    """Yield each row with its generated text, once for each sample; the n-th has the seed `generation.seed` + n."""
    asked = [(row, ids, n) for row, ids in zip(rows, prompts, strict=True) for n in range(1, output.samples + 1)]
    for begin in range(0, len(asked), BATCH_SIZE):
        part = asked[begin : begin + BATCH_SIZE]
        batch = [ids for _, ids, _ in part], replace(generation, seed=generation.seed + begin)
        answers = [row.fields | ({"sample": n} if output.samples > 1 else {}) for row, _, n in part]
        if output.compare_base:
            with disable_adapter(model):
                bases = generate_text(model, tokenizer, *batch)
            answers = [{**answer, "base": base} for answer, base in zip(answers, bases, strict=True)]
        for answer, text in zip(answers, generate_text(model, tokenizer, *batch), strict=True):
            yield {**answer, "text": text}


def _as_text(answer: Fields, output: Output, adapter: str = "") -> str:
    """Format the texts, each under the number of its sample and, beside that of the base, the name of the model."""
    sample = f"sample {answer['sample']} of {output.samples}" if output.samples > 1 else ""
    texts = {"base": answer["base"], adapter: answer["text"]} if output.compare_base else {"": answer["text"]}
    titles = (", ".join(filter(None, (sample, name))) for name in texts)
    return "\n".join(f"--- {title}\n{text}" for title, text in zip(titles, texts.values(), strict=True))
