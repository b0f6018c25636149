"""minilora generate: answer or continue prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace

from minilora.adapters.attach import disable_adapter
from minilora.cli.columns import columns
from minilora.cli.command import INTERRUPTED, Options, say
from minilora.cli.flags import from_flags
from minilora.cli.groups import Output, Writing
from minilora.cli.load import Loaded, load
from minilora.cli.prompts import encode_prompts, read_prompts
from minilora.cli.write import write
from minilora.errors import ConfigError
from minilora.runs.formats import Fields
from minilora.runs.rows import Row


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
