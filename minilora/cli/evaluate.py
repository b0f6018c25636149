"""minilora eval: measure a model on rows of data."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

from minilora.cli.command import Command, Options, say_bad
from minilora.cli.flags import add_flags, from_flags, names_of, use_config
from minilora.cli.load import adapters, add_model_flags, how_trained, load
from minilora.errors import ConfigError
from minilora.train.config import DataConfig
from minilora.train.data import encode_rows, use_prompt_style
from minilora.train.evaluate import choice_accuracy, exact_match, find_choices, held_out_loss
from minilora.train.rows import read_held_out

METRICS = ("nll", "choice", "exact-match")


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    parser.add_argument("--data", required=True, nargs="+", help="rows; of a directory, the test split")
    parser.add_argument(
        "--metric",
        choices=METRICS,
        default="nll",
        help="nll: the loss of a labelled token; choice: how often the right one of few answers is the likeliest; "
        "exact-match: how often the answer is written (default: nll)",
    )
    add_flags(parser, DataConfig, "data", but=("eval_split",))


def _prepare(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Rows are read as the adapter was trained on them, if flags do not say otherwise."""
    trained = how_trained(adapters(vars(parser.parse_known_args(words)[0]))).config
    names = names_of(parser) & {field.name for field in dataclasses.fields(DataConfig)}
    use_config(parser, {name: trained[name] for name in names & set(trained)}, "run.json")


def _run(options: Options) -> int:
    loaded = load(options)
    model, tokenizer = loaded.model, loaded.tokenizer
    config = from_flags(DataConfig, {"eval_split": 0.0, **options})
    rows = read_held_out(options["data"])
    examples = encode_rows(rows, use_prompt_style(tokenizer, config.prompt_style, rows), config)
    if options["metric"] == "nll":
        value = held_out_loss(model, examples)
    elif options["metric"] == "exact-match":
        value = exact_match(model, examples, tokenizer)
    elif choices := find_choices(examples):
        value = choice_accuracy(model, examples, choices)
    else:
        names = ", ".join(options["data"])
        raise ConfigError(f"{names}: --metric choice needs rows with few distinct answers, each given often")
    counts = {"rows": len(examples), "truncated": examples.truncated, "unlabelled": examples.unlabelled}
    if examples.bad:
        counts["bad"] = len(examples.bad)
        say_bad("", examples.bad)
    print(json.dumps({"metric": options["metric"], "value": value, **counts}))
    return 0


COMMAND = Command(
    name="eval",
    help="measure a model, with or without an adapter, on rows of data",
    about="Measure a model, with or without an adapter, on rows of data; print one JSON object.",
    example="minilora eval --adapter run --data rows.jsonl --metric exact-match",
    add_flags=_add_flags,
    run=_run,
    prepare=_prepare,
)
