"""Fold adapters into a model's weights and write the model.

The weights are read, merged and written one at a time. With a weight behind
its name, as in --adapter one:0.7 --adapter two:0.3, an adapter is multiplied
by it; a negative weight subtracts the adapter.

Example:
  minilora merge --adapter run --out merged
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from torch import nn

from minilora.adapters.combine import CombineConfig, Cut
from minilora.adapters.find import base_held
from minilora.adapters.weighted import combine_directories
from minilora.cli import Options
from minilora.cli.flags import add_fields, from_flags
from minilora.cli.load import (
    Found,
    adapters,
    add_model_flags,
    base_of,
    find,
    how_trained,
    recorded_quantization,
    say_quantization,
    was_trained_on,
)
from minilora.errors import ConfigError
from minilora.models.bitsandbytes import QuantizeConfig, Target
from minilora.models.classifier import load_for
from minilora.models.hub import fetch
from minilora.runs.run import pick_device
from minilora.storage import holds_files, write_text
from minilora.tools.merging import Deviation, merge_directory

NOTABLE = 0.1  # error of a merge, relative to what the adapter does, from which on advice is given
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser, many_adapters=True)
    parser.add_argument("--out", required=True, help="directory to write; it must not hold files")
    parser.add_argument(
        "--target",
        choices=get_args(Target),
        help="what to merge into: original, the 16-bit weights; dequantized, the 4-bit weights that were trained on, "
        "made dense; requantized, these in four bits again (default: as the base was in training)",
    )
    parser.add_argument(
        "--as-adapter", action="store_true", help="write the adapters as one adapter, and no model; no base is needed"
    )
    add_fields(parser, CombineConfig, "how adapters become one")


def run(options: Options) -> int:
    out, pairs = Path(options["out"]), [split_weight(text) for text in adapters(options)]
    if not pairs:
        raise ConfigError("there is nothing to merge: give --adapter")
    if holds_files(out):
        raise ConfigError(f"{out}: holds files; give another --out")
    names, given = zip(*pairs, strict=True)
    options, config = {**options, "adapter": list(names)}, from_flags(CombineConfig, options)
    weights = [1.0 if weight is None else weight for weight in given]
    if options["as_adapter"]:
        return _write_adapter(options, weights, config, out)
    if config == CombineConfig() and all(weight is None for weight in given):
        return _merge(options, None, out)
    with tempfile.TemporaryDirectory() as scratch:
        paths = [fetch(name, "adapter") for name in names]
        _print_cut(combine_directories(paths, weights, Path(scratch), config))
        return _merge({**options, "adapter": list(map(str, paths))}, Path(scratch), out)


def split_weight(text: str) -> tuple[str, float | None]:
    """The name of an adapter, and the weight that was written behind it, if one was.

    >>> split_weight("org/name@v1:0.7"), split_weight("-"), split_weight("C:/adapters/a:-1"), split_weight("C:/7")
    (('org/name@v1', 0.7), ('-', None), ('C:/adapters/a', -1.0), ('C:/7', None))
    """
    found = re.fullmatch(rf"(.+):({NUMBER})", text, re.ASCII)
    return (text, None) if found is None or Path(text).exists() else (found[1], float(found[2]))


def _write_adapter(options: Options, weights: Sequence[float], config: CombineConfig, out: Path) -> int:
    """One adapter in place of a merged model."""
    unset = {"target": None, "quantize": None, "double_quant": None, "quantize_skip": None, "dtype": "auto"}
    if idle := [name for name, value in {**unset, "device": "auto"}.items() if options[name] != value]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ConfigError(f"{flags}: without effect on --as-adapter, which needs no model")
    paths = [fetch(name, "adapter") for name in adapters(options)]
    base = base_of({**options, "adapter": list(map(str, paths))})
    cuts = combine_directories(paths, weights, out, config, base)
    if template := how_trained(paths).template:
        write_text(out / "chat_template.jinja", template)
    ranks = [cut.factors.lora_A.size(0) for cut in cuts.values()]
    _print_cut(cuts)
    print(f"adapter of rank {max(ranks)} written to {out}")
    return 0


def _merge(options: Options, combined: Path | None, out: Path) -> int:
    """The adapters, or what was combined of them, merged into their base."""
    target, found, device = options["target"], find(options), pick_device(options["device"])
    into = QuantizeConfig("none") if target == "original" else found.quantize
    here = base_held(_weightless(found, into))
    say_quantization(here, found.adapters)
    trained = recorded_quantization(found.base.path, found.adapters) or found.quantize
    known = here if trained == into else base_held(_weightless(found, trained))
    is_known = all(was_trained_on(known, path) for path in found.adapters)
    deviation = merge_directory(
        found.base.path,
        [combined] if combined else found.adapters,
        out,
        target,
        found.quantize,
        options["dtype"],
        device,
        found.tokenizer,
        trained=trained if is_known else None,
    )
    is_exchanged = target in ("original", "requantized") and found.quantize.quantize != "none"
    print(f"{_in_words(deviation, is_known, is_exchanged)}\nmerged model written to {out}")
    return 0


def _weightless(found: Found, quantize: QuantizeConfig) -> nn.Module:
    return load_for(found.unit, found.labels, found.base.path, "auto", "meta", quantize)


def _print_cut(cuts: Mapping[str, Cut]) -> None:
    """How much of the combination an SVD has cut off, if one has."""
    deviation = Deviation.of({path: (cut.lost, cut.total) for path, cut in cuts.items()})
    if deviation.overall is not None:
        print(
            f"error of the cut, relative to what the adapters do together: {deviation.overall:.2g}; "
            f"worst {deviation.worst:.2g} in {deviation.layer}"
        )


def _in_words(deviation: Deviation, is_known: bool, is_exchanged: bool) -> str:
    """`is_known`: it is measured against the base of the training; `is_exchanged`: another one is written."""
    if deviation.overall is None:
        return "the adapter changes nothing"
    words = (
        f"error at the layers' outputs for inputs of all directions, {'' if is_known else 'on the base as held here, '}"
        f"relative to the adapter's effect: {deviation.overall:.2g}; worst {deviation.worst:.2g} in {deviation.layer}"
    )
    if deviation.overall > NOTABLE:
        words += (
            f"\nwhat was rounded or exchanged is {deviation.overall:.0%} of what the adapter does; --dtype float32 "
            f"rounds less{', --target dequantized exchanges nothing' if is_exchanged else ''}"
        )
    return words
