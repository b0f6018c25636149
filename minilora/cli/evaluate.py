"""Evaluate a model, with or without an adapter, on rows of data.

The result is printed as one JSON object.

Example:
  minilora eval --adapter run --data rows.jsonl --metric exact-match
"""

import json
from dataclasses import replace
from functools import partial

from minilora.cli import Options, Parser, say
from minilora.cli.flags import add_fields, from_flags
from minilora.cli.load import THINKING, add_model_flags, load, run_settings, thinking_of
from minilora.cli.messages import describe_skipped
from minilora.cli.streaming import merged_if_small
from minilora.data import IGNORE_INDEX, Example
from minilora.errors import ConfigError
from minilora.llama import Llama
from minilora.models.tokenizer import Tokenizer
from minilora.runs.directory import without_nan
from minilora.runs.encoders import Dataset, encode_prompt, encode_rows, with_prompt_style
from minilora.runs.evaluate import (
    MAX_CHOICES,
    Progress,
    answer_of,
    choice_accuracy,
    exact_match,
    find_choices,
    held_out_loss,
)
from minilora.runs.inputs import files_to_evaluate
from minilora.runs.reports import ProgressBar
from minilora.runs.rows import stream_rows
from minilora.runs.settings import DataConfig


def add_flags(parser: Parser) -> None:
    add_model_flags(parser)
    about = "rows, as for finetune --data; of a directory, the test rows, or else the validation rows"
    parser.add_argument("--data", required=True, nargs="+", help=about)
    parser.add_argument(
        "--metric",
        choices=("nll", "choice", "exact-match"),
        default="nll",
        help="nll: the mean loss per token of the answers; choice: the share of rows whose right answer is the most "
        f"likely of all answers in the rows (2 to {MAX_CHOICES} distinct ones, each given four times on average); "
        "exact-match: the share of rows for which the model writes the right answer, after any thoughts (default: nll)",
    )
    parser.add_argument("--thinking", **THINKING)
    add_fields(parser, DataConfig, "data", unset="as in the adapter's run")


def run(options: Options) -> int:
    trained = run_settings(options)
    config = from_flags(DataConfig, options, {**trained, "prompt_style": None, "system": None})  # which have own files
    files = files_to_evaluate(options["data"])
    rows = list(stream_rows(*files, columns=config.columns))
    model, tokenizer = load(options)
    config = replace(config, system=tokenizer.prompts.system if config.system is None else config.system)
    tokenizer = with_prompt_style(tokenizer, config.prompt_style, rows)
    thinking = thinking_of(options, tokenizer)
    if options["metric"] == "exact-match":
        config = replace(config, train_on="completion")  # the last answer is asked for
    elif options["thinking"] is not None:
        raise ConfigError(
            "--thinking and --no-thinking need --metric exact-match: the other metrics generate no answer"
        )
    examples = encode_rows(rows, tokenizer, config)
    if options["metric"] == "exact-match" and thinking is not None:  # whatever the rows have
        sources = {row.source: row for row in rows}
        for i, example in enumerate(examples):
            row, answer = sources[example.source], answer_of(example)
            prompt = encode_prompt(row, tokenizer, config.system, "plain", thinking)
            examples[i] = Example([*prompt, *answer], [*[IGNORE_INDEX] * len(prompt), *answer], example.source)
    with ProgressBar() as bar:
        value = _measure(model, tokenizer, examples, options, partial(bar.show, f"{options['metric']}: row"))
    counts = {"rows": len(examples), "truncated": examples.truncated, "unlabelled": examples.unlabelled}
    if examples.bad:
        counts["bad"] = len(examples.bad)
        say(describe_skipped("", examples.bad))
    print(json.dumps(without_nan({"metric": options["metric"], "value": value, **counts})))
    return 0


def _measure(model: Llama, tokenizer: Tokenizer, examples: Dataset, options: Options, progress: Progress) -> float:
    if options["metric"] == "nll":
        return held_out_loss(model, examples, progress)
    if options["metric"] == "exact-match":
        with merged_if_small(model):
            return exact_match(model, examples, tokenizer, progress)
    if choices := find_choices(examples):
        return choice_accuracy(model, examples, choices, progress)
    need = f"2 to {MAX_CHOICES} distinct answers, each given four times on average, and rows with prompts"
    raise ConfigError(f"{', '.join(options['data'])}: --metric choice needs {need}")
