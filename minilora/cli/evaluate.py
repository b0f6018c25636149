"""Evaluate a model, with or without an adapter, on rows of data.

The result is printed as one JSON object.

Example:
  minilora eval --adapter run --data rows.jsonl --metric exact-match
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from minilora.cli import Options, describe_skipped, say
from minilora.cli.flags import add_fields, from_flags, names_of, use_config
from minilora.cli.load import add_model_flags, find, load, read_run
from minilora.cli.write import cells, fit, padded
from minilora.durable import without_nan
from minilora.errors import ConfigError
from minilora.llama import Llama
from minilora.models.classifier import Classifier
from minilora.models.hub import fetch
from minilora.models.tokenizer import Tokenizer
from minilora.runs.config import DataConfig
from minilora.runs.dataset import Dataset
from minilora.runs.encoders import encode_classes, encode_rows, use_prompt_style
from minilora.runs.evaluate import choice_accuracy, evaluate_classes, exact_match, find_choices, held_out_loss
from minilora.runs.inputs import read_eval_rows

LABEL_WIDTH = 24
MISTAKES = 10  # the number that is listed where the table would be too wide
METRICS = ("nll", "choice", "exact-match")  # of a language model
CLASS_METRICS = ("accuracy", "nll")  # of a classifier


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    parser.add_argument(
        "--data", required=True, nargs="+", help="files, directories or hub ids; of a directory, the test split is used"
    )
    parser.add_argument(
        "--metric",
        choices=sorted({*METRICS, *CLASS_METRICS}),
        help="nll: mean loss of a labelled token; choice: how often the right one of a few answers is the most likely; "
        "exact-match: how often the right answer is generated; accuracy: how often a classifier is right "
        "(default: accuracy for classifiers, otherwise nll)",
    )
    add_fields(parser, DataConfig, "data")


def prepare(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Make the settings that the adapter's rows were read with the defaults."""
    adapters = [fetch(name, "adapter") for name in parser.parse_known_args(words)[0].adapter]
    trained, fields = read_run(adapters)["config"], {field.name for field in dataclasses.fields(DataConfig)}
    use_config(parser, {name: trained[name] for name in fields & names_of(parser) & {*trained}}, "run.json")


def run(options: Options) -> int:
    found = find(options)
    metrics = CLASS_METRICS if found.unit else METRICS
    metric = options["metric"] or metrics[0]
    if metric not in metrics:
        kind = "classifier" if found.unit else "language model"
        raise ConfigError(f"--metric {metric}: this is a {kind}, whose metrics are {', '.join(metrics)}")
    config = from_flags(DataConfig, options)
    rows = read_eval_rows(options["data"])
    model, tokenizer = load(options, found)
    if isinstance(model, Classifier):
        examples = encode_classes(rows, tokenizer, config, model.unit, model.labels)
        scores = evaluate_classes(model, examples)
        say(confusion_table(scores.class_scores, shutil.get_terminal_size().columns))
        measured = {"value": scores.loss if metric == "nll" else scores.accuracy, **scores.record()}
    else:
        examples = encode_rows(rows, use_prompt_style(tokenizer, config.prompt_style, rows), config)
        measured = {"value": _measure(model, tokenizer, examples, metric, options["data"])}
    counts = {"rows": len(examples), "truncated": examples.truncated, "unlabelled": examples.unlabelled}
    if examples.bad:
        counts["bad"] = len(examples.bad)
        say(describe_skipped("", examples.bad))
    print(json.dumps(without_nan({"metric": metric, **measured, **counts})))
    return 0


def _measure(model: Llama, tokenizer: Tokenizer, examples: Dataset, metric: str, names: Sequence[str]) -> float:
    """Compute a metric of a language model."""
    if metric == "nll":
        return held_out_loss(model, examples)
    if metric == "exact-match":
        return exact_match(model, examples, tokenizer)
    if choices := find_choices(examples):
        return choice_accuracy(model, examples, choices)
    raise ConfigError(f"{', '.join(names)}: --metric choice needs rows with few distinct answers, each given often")


def confusion_table(scores: Mapping[str, Any], width: int) -> str:
    """Format `class_scores` as a table with a row for each class: how often it was predicted as each, and its scores.

    If the table is wider than `width`, it has the scores alone, and the most frequent mistakes follow.
    """
    names = [f"{i} {fit(label, LABEL_WIDTH)}" for i, label in enumerate(scores["classes"])]
    counts, head, keys = scores["confusion"], ["precision", "recall", "F1", "count"], ("precision", "recall", "f1")
    rows = [[*(f"{found[key]:.3f}" for key in keys), str(found["count"])] for found in scores["classes"].values()]
    lines = [[name, *map(str, row), *found] for name, row, found in zip(names, counts, rows, strict=True)]
    table = _aligned([["true/predicted", *map(str, range(len(names))), *head], *lines])
    if max(map(cells, table)) <= width:
        return "\n".join(table)
    table = _aligned([["class", *head], *([name, *found] for name, found in zip(names, rows, strict=True))])
    mistakes = sorted((-n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j)
    return "\n".join([*table, *(f"{names[i]} predicted as {names[j]}: {-n}" for n, i, j in mistakes[:MISTAKES])])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the first column to the left, the others to the right."""
    width = max(cells(row[0]) for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][1:]
    return ["  ".join([padded(name, width), *map(str.rjust, numbers, widths)]) for name, *numbers in rows]
