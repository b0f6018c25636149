"""minilora generate: answer or continue prompts."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from minilora.cli.columns import columns
from minilora.cli.command import Command, Options, add_dashed, add_model_flags, load
from minilora.cli.finetune import INTERRUPTED
from minilora.cli.prompts import Prompt, add_prompt_flags, encode_prompt, how_to_ask, read_prompts
from minilora.cli.write import add_writing_flags, write
from minilora.errors import ConfigError
from minilora.lora.attach import disable_adapter
from minilora.model.llama import Llama
from minilora.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer:
    """What was written for a prompt; `base` is what the base model wrote, where that was asked for."""

    prompt: Prompt
    sample: int
    text: str
    base: str | None


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    add_prompt_flags(parser)
    add_writing_flags(parser, max_new_tokens=64)
    group = parser.add_argument_group("output")
    group.add_argument("--samples", type=int, default=1, metavar="N", help="texts for each prompt (default: 1)")
    add_dashed(
        group, "compare_base", action="store_true", help="show what the base model writes, left, beside the adapter's"
    )
    group.add_argument(
        "--json",
        action="store_true",
        help="print a JSON object a line, as --prompts and several --prompt always do: the prompt's row and `text`; "
        "`sample`, from 1, with --samples, and `base` with --compare-base",
    )
    add_dashed(
        group,
        "batch_size",
        type=int,
        default=8,
        metavar="N",
        help="texts written at a time; it does not change them (default: 8)",
    )


def _run(options: Options) -> int:
    for name in ("samples", "batch_size"):
        if options[name] < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {options[name]}, need at least 1")
    if options["compare_base"] and not options["adapter"]:
        raise ConfigError("--compare-base needs --adapter")
    rows = read_prompts(options)
    model, tokenizer = load(options)
    asking = how_to_ask(options)
    prompts = [encode_prompt(row, tokenizer, options["system"], asking) for row in rows]
    is_json = options["json"] or options["prompts"] is not None or len(prompts) > 1
    try:
        if is_json or options["compare_base"] or options["samples"] > 1:
            for answer in _answers(model, tokenizer, prompts, options):
                print(_as_json(answer, options) if is_json else _as_text(answer, options), flush=True)
        else:
            write(model, tokenizer, [prompts[0].ids], options, options["seed"], _show)
            print()
    except KeyboardInterrupt:
        print()
        return INTERRUPTED
    return 0


def _answers(model: Llama, tokenizer: Tokenizer, prompts: Sequence[Prompt], options: Options) -> Iterator[Answer]:
    """All samples of the first prompt, then of the next, in batches; the n-th has a seed of its own, `seed` + n."""
    asked = [(prompt, sample) for prompt in prompts for sample in range(1, options["samples"] + 1)]
    for begin in range(0, len(asked), options["batch_size"]):
        part = asked[begin : begin + options["batch_size"]]
        batch = [prompt.ids for prompt, _ in part], options, options["seed"] + begin
        bases: Sequence[str | None] = [None] * len(part)
        if options["compare_base"]:
            with disable_adapter(model):
                bases = write(model, tokenizer, *batch)
        texts = write(model, tokenizer, *batch)
        for (prompt, sample), text, base in zip(part, texts, bases, strict=True):
            yield Answer(prompt, sample, text, base)


def _as_json(answer: Answer, options: Options) -> str:
    sample = {"sample": answer.sample} if options["samples"] > 1 else {}
    base = {} if answer.base is None else {"base": answer.base}
    return json.dumps({**answer.prompt.fields, **sample, **base, "text": answer.text}, ensure_ascii=False)


def _as_text(answer: Answer, options: Options) -> str:
    """The text, under its number if it is one of several, or in a column beside the base model's."""
    number = f"--- sample {answer.sample} of {options['samples']}\n" if options["samples"] > 1 else ""
    if answer.base is None:
        return number + answer.text
    width = shutil.get_terminal_size().columns
    return number + columns(answer.base, answer.text, ("base", options["adapter"]), width)


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


COMMAND = Command(
    name="generate",
    help="answer or continue prompts",
    about="Answer prompts, each a user's turn of the chat template, or continue them if the\n"
    "model has none. One text is shown as it is written.",
    example='minilora generate --adapter run --prompt "Hello" --compare-base',
    add_flags=_add_flags,
    run=_run,
)
