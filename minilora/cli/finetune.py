"""minilora finetune: train an adapter."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from minilora.cli.command import Command, Options, say
from minilora.cli.flags import add_flags, from_flags
from minilora.cli.meter import Meter
from minilora.lora.config import LoraConfig
from minilora.run import Outcome, Run, RunConfig, Scores, evaluate, evaluate_base
from minilora.train.config import TrainConfig

INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, RunConfig, "files and device")
    add_flags(parser, LoraConfig, "adapter")
    add_flags(parser, TrainConfig, "training")
    parser.add_argument(
        "--config", type=Path, help="a .toml or .json file of these flags; the command line goes on top"
    )


def _run(options: Options) -> int:
    run = Run(from_flags(RunConfig, options), from_flags(LoraConfig, options), from_flags(TrainConfig, options))
    step = run.prepare()
    model, tokenizer, data, count = run.load()
    run.start(model, data, step)
    weight = model.model.embed_tokens.weight
    say(
        f"{count.trainable:,} of {count.total:,} parameters are trained ({count.trainable / count.total:.2%}); "
        f"{len(data.train):,} rows to learn from, {len(data.test):,} held out; "
        f"{weight.dtype} on {weight.device}".replace("torch.", "")
    )
    longest, limit = max(len(example.tokens) for example in data.train), model.config.rope.max_length
    if longest > limit:
        say(f"the longest row has {longest} tokens, and the model was made for {limit}: see --max-length")
    splits = {"training": data.train, "validation": data.valid, "held-out": data.test}
    for name, rows in splits.items():
        if rows.truncated and not (name == "validation" and rows is data.test):
            say(f"{rows.truncated} {name} rows were cut to --max-length; {rows.unlabelled} of them had no label left")
    if step:
        say(f"going on from step {step}")
    if data.test:
        say(f"measuring the base model on {len(data.test):,} rows")
    before = evaluate_base(model, data.test, data.choices)
    meter = Meter()
    previous = signal.signal(signal.SIGINT, meter.stop)
    try:
        result = run.train(model, data, meter)
    finally:
        signal.signal(signal.SIGINT, previous)
        meter.close()
    if not result.finished:
        say(f"stopped after step {result.steps} of {result.total_steps}; the same command goes on from there")
        return INTERRUPTED
    if data.test:
        say(f"measuring the adapter on {len(data.test):,} rows")
    outcome = Outcome(result, before, evaluate(model, data.test, data.choices))
    run.finish(model, tokenizer, outcome)
    print(_table(outcome))
    print(f"adapter written to {run.out}")
    return 0


def _table(outcome: Outcome) -> str:
    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    def row(name: str, scores: Scores) -> str:
        return f"{name:<10}{cell(scores.loss):>15}{cell(scores.accuracy):>12}"

    head = f"{'':<10}{'held-out loss':>15}{'accuracy':>12}"
    result = outcome.result
    speed = f"{result.steps} steps, {result.tokens:,} tokens, {result.seconds:.1f} s"
    return "\n".join((head, row("base", outcome.before), row("adapter", outcome.after), speed))


COMMAND = Command(
    name="finetune",
    help="train an adapter; without --model and --data, on a built-in model and data",
    about="Train an adapter. Without --model and --data, on a built-in model and data, in less than a minute.",
    example="minilora finetune --model path/to/model --data rows.jsonl --out run --learning-rate 1e-4",
    add_flags=_add_flags,
    run=_run,
)
