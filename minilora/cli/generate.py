"""minilora generate: answer or continue prompts."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from minilora.cli.columns import columns
from minilora.cli.command import Command, Loaded, Options, add_model_flags, load_adapted
from minilora.cli.finetune import INTERRUPTED
from minilora.cli.flags import add_flags, from_flags
from minilora.cli.prompts import Prompt, add_prompt_flags, encode_prompts, read_prompts
from minilora.cli.write import Writing, add_writing_flags, write
from minilora.errors import ConfigError
from minilora.lora.attach import disable_adapter
from minilora.train.config import option


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
    batch_size: int = option(8, "texts written at a time; it does not change them")

    def __post_init__(self) -> None:
        counts = {"samples": self.samples, "batch_size": self.batch_size}
        if bad := [f"{name} is {value}" for name, value in counts.items() if value < 1]:
            raise ConfigError(f"{', '.join(bad)}, need at least 1")


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
    add_flags(parser, Output, "output")


def _run(options: Options) -> int:
    output, writing = from_flags(Output, options), from_flags(Writing, options)
    if output.compare_base and not options["adapter"]:
        raise ConfigError("--compare-base needs --adapter")
    rows = read_prompts(options)
    loaded = load_adapted(options)
    prompts = encode_prompts(rows, loaded, options)
    is_json = output.json or options["prompts"] is not None or len(prompts) > 1
    try:
        if is_json or output.compare_base or output.samples > 1:
            for answer in _answers(loaded, prompts, writing, output):
                print(_as_json(answer, output) if is_json else _as_text(answer, output, options["adapter"]), flush=True)
        else:
            write(loaded.model, loaded.tokenizer, [prompts[0].ids], writing, _show)
            print()
    except KeyboardInterrupt:
        print()
        return INTERRUPTED
    return 0


def _answers(loaded: Loaded, prompts: Sequence[Prompt], writing: Writing, output: Output) -> Iterator[Answer]:
    """All samples of the first prompt, then of the next, in batches; the n-th has a seed of its own, `seed` + n."""
    asked = [(prompt, sample) for prompt in prompts for sample in range(1, output.samples + 1)]
    for begin in range(0, len(asked), output.batch_size):
        part = asked[begin : begin + output.batch_size]
        batch = [prompt.ids for prompt, _ in part], replace(writing, seed=writing.seed + begin)
        bases: Sequence[str | None] = [None] * len(part)
        if output.compare_base:
            with disable_adapter(loaded.model):
                bases = write(loaded.model, loaded.tokenizer, *batch)
        texts = write(loaded.model, loaded.tokenizer, *batch)
        for (prompt, sample), text, base in zip(part, texts, bases, strict=True):
            yield Answer(prompt, sample, text, base)


def _as_json(answer: Answer, output: Output) -> str:
    sample = {"sample": answer.sample} if output.samples > 1 else {}
    base = {} if answer.base is None else {"base": answer.base}
    return json.dumps({**answer.prompt.fields, **sample, **base, "text": answer.text}, ensure_ascii=False)


def _as_text(answer: Answer, output: Output, adapter: str) -> str:
    """The text, under its number if it is one of several, or in a column beside the base model's."""
    number = f"--- sample {answer.sample} of {output.samples}\n" if output.samples > 1 else ""
    if answer.base is None:
        return number + answer.text
    width = shutil.get_terminal_size().columns
    return number + columns(answer.base, answer.text, ("base", adapter), width)


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
