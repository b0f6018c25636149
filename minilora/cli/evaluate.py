"""minilora eval: measure a model on rows of data."""

from __future__ import annotations

import argparse
import json

from minilora.cli.command import Command, Options, add_dashed, add_model_flags, load
from minilora.errors import ConfigError
from minilora.train.data import encode_rows, find_splits, read_rows
from minilora.train.evaluate import choice_accuracy, exact_match, find_choices, held_out_loss

METRICS = ("nll", "choice", "exact-match")


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    parser.add_argument("--data", required=True, help="rows; of a directory, the test split")
    parser.add_argument(
        "--metric",
        choices=METRICS,
        default="nll",
        help="nll: the loss of a labelled token; choice: how often the right one of few answers is the likeliest; "
        "exact-match: how often the answer is written (default: nll)",
    )
    add_dashed(parser, "max_length", type=int, default=1024, help="tokens after which a row is cut (default: 1024)")


def _run(options: Options) -> int:
    model, tokenizer = load(options)
    files = find_splits(options["data"])
    rows = read_rows(next(files[split] for split in ("test", "valid", "train") if split in files))
    examples = encode_rows(rows, tokenizer, "completion", options["max_length"])
    if options["metric"] == "nll":
        value = held_out_loss(model, examples)
    elif options["metric"] == "exact-match":
        value = exact_match(model, examples, tokenizer)
    elif choices := find_choices(examples):
        value = choice_accuracy(model, examples, choices)
    else:
        raise ConfigError(f"{options['data']}: --metric choice needs rows with few distinct answers, each given often")
    counts = {"rows": len(examples), "truncated": examples.truncated, "unlabelled": examples.unlabelled}
    print(json.dumps({"metric": options["metric"], "value": value, **counts}))
    return 0


COMMAND = Command(
    name="eval",
    help="measure a model, with or without an adapter, on rows of data",
    about="Measure a model, with or without an adapter, on rows of data; print one JSON object.",
    example="minilora eval --adapter run --data rows.jsonl --metric exact-match",
    add_flags=_add_flags,
    run=_run,
)
