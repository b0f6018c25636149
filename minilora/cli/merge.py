"""minilora merge: fold adapters into a model's weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from minilora.cli.command import Command, Options
from minilora.cli.load import adapters, add_model_flags, find, recorded_quantization, say_quantization, was_trained_on
from minilora.errors import ConfigError
from minilora.lora.attach import base_held
from minilora.merging import Deviation, Target, merge_directory
from minilora.model.checkpoint import load_model
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
    out, target = Path(options["out"]), options["target"]
    if not adapters(options):
        raise ConfigError("there is nothing to merge: give --adapter")
    if holds_files(out):
        raise ConfigError(f"{out}: holds files; give another --out")
    found, device = find(options), pick_device(options["device"])
    into = QuantizeConfig("none") if target == "original" else found.quantize
    here = base_held(load_model(found.base.path, device="meta", quantize=into))
    say_quantization(here, found.adapters)
    trained = recorded_quantization(found.base.path, found.adapters) or found.quantize
    known = here if trained == into else base_held(load_model(found.base.path, device="meta", quantize=trained))
    is_known = all(was_trained_on(known, path) for path in found.adapters)
    deviation = merge_directory(
        found.base.path,
        found.adapters,
        out,
        target,
        found.quantize,
        options["dtype"],
        device,
        found.tokenizer,
        trained=trained if is_known else None,
    )
    print(f"{_in_words(deviation, is_known)}\nmerged model written to {out}")
    return 0


def _in_words(deviation: Deviation, is_known: bool) -> str:
    """`is_known`: it is the base of the training that it is measured against."""
    if deviation.overall is None:
        return "the adapter changes nothing"
    words = (
        f"error at the layers' outputs for inputs of all directions, {'' if is_known else 'on the base as held here, '}"
        f"relative to the adapter's effect: {deviation.overall:.2g}; worst {deviation.worst:.2g} in {deviation.layer}"
    )
    if deviation.overall > 1:
        words += "\nwhat was rounded or exchanged is larger than what the adapter does; --dtype float32 rounds less"
    return words


COMMAND = Command(
    name="merge",
    help="fold adapters into a model's weights and write the model",
    about="Fold adapters into a model's weights and write the model, one weight at a time.",
    example="minilora merge --adapter run --out merged",
    add_flags=_add_flags,
    run=_run,
)
