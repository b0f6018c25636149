"""minilora merge: fold adapters into a model's weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from minilora.cli.command import (
    Command,
    Options,
    adapters,
    add_model_flags,
    base_of,
    how_trained,
    quantization,
    say_quantization,
)
from minilora.errors import ConfigError
from minilora.hub import fetch
from minilora.merging import Deviation, Target, merge_directory
from minilora.model.checkpoint import load_model
from minilora.model.tokenizer import load_tokenizer
from minilora.quant.config import QuantizeConfig
from minilora.run import holds_files, pick_device


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser, many_adapters=True)
    parser.add_argument("--out", required=True, help="directory to write; it must not hold files")
    parser.add_argument(
        "--target",
        choices=get_args(Target),
        help="what to merge into: original, the 16-bit weights; dequantized, the 4-bit weights that were trained on, "
        "made dense; requantized, these in four bits again (default: as the base was in training)",
    )


def _run(options: Options) -> int:
    out, names = Path(options["out"]), adapters(options)
    if not names:
        raise ConfigError("there is nothing to merge: give --adapter")
    if holds_files(out):
        raise ConfigError(f"{out}: holds files; give another --out")
    if "" in (options["model"], *names):
        raise ConfigError("--model or --adapter is empty; leave it out, or name something")
    paths = [fetch(name, "adapter") for name in names]
    base = fetch(base_of({**options, "adapter": list(map(str, paths))}), "model")
    target, held = options["target"], quantization(options, str(base), paths)
    here = QuantizeConfig("none") if target == "original" else held
    say_quantization(load_model(base, device="meta", quantize=here), paths)
    tokenizer, training = load_tokenizer(base), how_trained(paths)
    if training.template:
        tokenizer = tokenizer.with_template(training.template)
    device = pick_device(options["device"])
    deviation = merge_directory(base, paths, out, target, held, options["dtype"], device, tokenizer)
    print(f"{_in_words(deviation)}\nmerged model written to {out}")
    return 0


def _in_words(deviation: Deviation) -> str:
    if deviation.overall is None:
        return "the adapter changes nothing"
    return (
        f"error at the layers' outputs, relative to the adapter's effect: {deviation.overall:.2g}; "
        f"worst {deviation.worst:.2g} in {deviation.layer}"
    )


COMMAND = Command(
    name="merge",
    help="fold adapters into a model's weights and write the model",
    about="Fold adapters into a model's weights and write the model, one weight at a time.",
    example="minilora merge --adapter run --out merged",
    add_flags=_add_flags,
    run=_run,
)
