"""Measure a model, with or without an adapter, on rows of data.

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

from minilora.cli import Options, say, say_bad
from minilora.cli.columns import cells, fit
from minilora.cli.flags import add_fields, from_flags, names_of, use_config
from minilora.cli.load import Found, adapters, add_model_flags, find, how_trained, load, load_with_adapters
from minilora.errors import ConfigError
from minilora.models.classifier import Classifier
from minilora.runs.classes import encode_classes
from minilora.runs.config import DataConfig
from minilora.runs.data import Dataset, encode_rows, use_prompt_style
from minilora.runs.evaluate import choice_accuracy, evaluate_classes, exact_match, find_choices, held_out_loss
from minilora.runs.rows import Row, read_eval_rows

LABEL_WIDTH = 24
MISTAKES = 10  # that are listed where the table would be too wide

METRICS = ("nll", "choice", "exact-match")  # of a language model
CLASS_METRICS = ("accuracy", "nll")  # of a classifier


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    parser.add_argument("--data", required=True, nargs="+", help="rows; of a directory, the test split")
    parser.add_argument(
        "--metric",
        choices=sorted({*METRICS, *CLASS_METRICS}),
        help="nll: the loss of a labelled token; choice: how often the right one of few answers is the likeliest; "
        "exact-match: how often the answer is written; accuracy, of classifiers: how often the class is right "
        "(default: accuracy of a classifier, else nll)",
    )
    add_fields(parser, DataConfig, "data", but=("eval_split",))


def prepare(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Rows are read as the adapter was trained on them, if flags do not say otherwise."""
    trained = how_trained(adapters(vars(parser.parse_known_args(words)[0]))).config
    names = names_of(parser) & {field.name for field in dataclasses.fields(DataConfig)}
    use_config(parser, {name: trained[name] for name in names & set(trained)}, "run.json")


def run(options: Options) -> int:
    found = find(options)
    metrics = CLASS_METRICS if found.unit else METRICS
    metric = options["metric"] or metrics[0]
    if metric not in metrics:
        kind = "classifier" if found.unit else "language model"
        raise ConfigError(f"--metric {metric}: this is a {kind}, whose metrics are {', '.join(metrics)}")
    config = from_flags(DataConfig, {"eval_split": 0.0, **options})
    rows = read_eval_rows(options["data"])
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
    """Compute all scores of a classifier, and say its confusion matrix."""
    model, _ = load_with_adapters(options, found)
    assert isinstance(model, Classifier)
    examples = encode_classes(rows, found.required_tokenizer(), config, model.unit, model.labels)
    scores = evaluate_classes(model, examples)
    say(confusion_table(scores.class_scores, shutil.get_terminal_size().columns))
    return {"value": scores.loss if metric == "nll" else scores.accuracy, **scores.record()}, examples


def confusion_table(scores: Mapping[str, Any], width: int) -> str:
    """Format what `class_scores` says, a line for each class: how often it was predicted as each, and its scores.

    Where that is wider than `width`, the scores alone, and the most frequent mistakes below.
    """
    names = [f"{i} {fit(label, LABEL_WIDTH)}" for i, label in enumerate(scores["classes"])]
    counts, keys = scores["confusion"], ("precision", "recall", "f1")
    told = [[*(f"{found[key]:.3f}" for key in keys), str(found["count"])] for found in scores["classes"].values()]
    head, numbers = ["precision", "recall", "F1", "count"], [str(i) for i in range(len(names))]
    lines = [[name, *map(str, row), *found] for name, row, found in zip(names, counts, told, strict=True)]
    table = _aligned([["was; taken for", *numbers, *head], *lines])
    if max(map(cells, table)) <= width:
        return "\n".join(table)
    table = _aligned([["class", *head], *([name, *found] for name, found in zip(names, told, strict=True))])
    mistakes = sorted((-n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j)
    return "\n".join([*table, *(f"{names[i]} was taken for {names[j]}: {-n}" for n, i, j in mistakes[:MISTAKES])])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Pad the first column to the right, the others to the left."""
    widths = [max(map(cells, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        spaces = [" " * (width - cells(text)) for width, text in zip(widths, row, strict=True)]
        lines.append("  ".join([row[0] + spaces[0], *map(str.__add__, spaces[1:], row[1:])]))
    return lines
