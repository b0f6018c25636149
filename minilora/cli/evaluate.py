"""minilora eval: measure a model on rows of data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from typing import Any

from minilora.cli.command import Options, say, say_bad
from minilora.cli.commands import CLASS_METRICS, METRICS
from minilora.cli.confusion import confusion_table
from minilora.cli.flags import from_flags
from minilora.cli.load import Found, find, load, load_classes
from minilora.errors import ConfigError
from minilora.runs.classes import encode_classes
from minilora.runs.config import DataConfig
from minilora.runs.data import Dataset, encode_rows, use_prompt_style
from minilora.runs.evaluate import choice_accuracy, evaluate_classes, exact_match, find_choices, held_out_loss
from minilora.runs.rows import Row, read_held_out


def run(options: Options) -> int:
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
    examples = encode_classes(rows, found.required_tokenizer(), config, model.unit, model.labels)
    scores = evaluate_classes(model, examples)
    if scores.confusion:
        say(confusion_table(scores.confusion, shutil.get_terminal_size().columns))
    return {"value": scores.loss if metric == "nll" else scores.accuracy, **scores.record()}, examples
