"""minilora eval: measure a model on rows of data."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Sequence
from typing import Any

from minilora.cli.command import Command, Options, say, say_bad
from minilora.cli.confusion import confusion_table
from minilora.cli.flags import add_flags, from_flags, names_of, use_config
from minilora.cli.load import Found, adapters, add_model_flags, find, how_trained, load, load_classes
from minilora.errors import ConfigError
from minilora.train.classes import encode_classes
from minilora.train.config import DataConfig
from minilora.train.data import Dataset, encode_rows, use_prompt_style
from minilora.train.evaluate import choice_accuracy, evaluate_classes, exact_match, find_choices, held_out_loss
from minilora.train.rows import Row, read_held_out

METRICS = ("nll", "choice", "exact-match")  # of a language model
CLASS_METRICS = ("accuracy", "nll")  # of a classifier


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    parser.add_argument("--data", required=True, nargs="+", help="rows; of a directory, the test split")
    parser.add_argument(
        "--metric",
        choices=sorted({*METRICS, *CLASS_METRICS}),
        help="nll: the loss of a labelled token; choice: how often the right one of few answers is the likeliest; "
        "exact-match: how often the answer is written; accuracy, of classifiers: how often the class is right "
        "(default: accuracy of a classifier, else nll)",
    )
    add_flags(parser, DataConfig, "data", but=("eval_split",))


def _prepare(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Rows are read as the adapter was trained on them, if flags do not say otherwise."""
    trained = how_trained(adapters(vars(parser.parse_known_args(words)[0]))).config
    names = names_of(parser) & {field.name for field in dataclasses.fields(DataConfig)}
    use_config(parser, {name: trained[name] for name in names & set(trained)}, "run.json")


def _run(options: Options) -> int:
    found = find(options)
    metrics = CLASS_METRICS if found.unit else METRICS
    metric = options["metric"] or metrics[0]
    if metric not in metrics:
        kind = "classifier" if found.unit else "language model"
        raise ConfigError(f"--metric {metric}: this is a {kind}, whose metrics are {', '.join(metrics)}")
    config = from_flags(DataConfig, {"eval_split": 0.0, **options})
    rows = read_held_out(options["data"])
    measured, examples = (_measure_classes if found.unit else _measure)(options, found, metric, rows, config)
    counts = {"rows": len(examples), "truncated": examples.truncated, "unlabelled": examples.unlabelled}
    if examples.bad:
        counts["bad"] = len(examples.bad)
        say_bad("", examples.bad)
    print(json.dumps({"metric": metric, **measured, **counts}))
    return 0


def _measure(
    options: Options, found: Found, metric: str, rows: Sequence[Row], config: DataConfig
) -> tuple[dict[str, Any], Dataset]:
    loaded = load(options, found)
    model, tokenizer = loaded.model, loaded.tokenizer
    examples = encode_rows(rows, use_prompt_style(tokenizer, config.prompt_style, rows), config)
    if metric == "nll":
        value = held_out_loss(model, examples)
    elif metric == "exact-match":
        value = exact_match(model, examples, tokenizer)
    elif choices := find_choices(examples):
        value = choice_accuracy(model, examples, choices)
    else:
        names = ", ".join(options["data"])
        raise ConfigError(f"{names}: --metric choice needs rows with few distinct answers, each given often")
    return {"value": value}, examples


def _measure_classes(
    options: Options, found: Found, metric: str, rows: Sequence[Row], config: DataConfig
) -> tuple[dict[str, Any], Dataset]:
    """Everything that is known of a classifier; the table of what was taken for what is said, too."""
    model = load_classes(options, found)
    examples = encode_classes(rows, found.tokenizer, config, model.unit, model.labels)
    scores = evaluate_classes(model, examples)
    if scores.confusion:
        say(confusion_table(scores.confusion, shutil.get_terminal_size().columns))
    return {"value": scores.loss if metric == "nll" else scores.accuracy, **scores.record()}, examples


COMMAND = Command(
    name="eval",
    help="measure a model, with or without an adapter, on rows of data",
    about="Measure a model, with or without an adapter, on rows of data; print one JSON object.",
    example="minilora eval --adapter run --data rows.jsonl --metric exact-match",
    add_flags=_add_flags,
    run=_run,
    prepare=_prepare,
)
