"""Merge adapters into a model's weights and save the model.

Weights are read, merged and written one at a time. A number after the name of
an adapter scales it, as in --adapter one:0.7 --adapter two:0.3; a negative
number subtracts it.

Example:
  minilora merge --adapter run --out merged
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from minilora.adapters.attach import describe_base
from minilora.adapters.combine import CombineConfig, LowRank
from minilora.adapters.config import flag
from minilora.adapters.layout import WEIGHTS_FILE
from minilora.adapters.weighted import combine_directories
from minilora.cli import Options, Parser, say
from minilora.cli.flags import add_fields, add_out, from_flags, new_directory
from minilora.cli.load import (
    MERGED,
    Found,
    add_model_flags,
    base_notes,
    base_of,
    check_not_merged,
    find,
    recorded_quantization,
    was_trained_on,
)
from minilora.errors import ConfigError
from minilora.files import read_json, sha256_of, write_json
from minilora.models.bitsandbytes import QuantizeConfig, Target
from minilora.models.checkpoint import load_model, pick_device
from minilora.models.hub import fetch
from minilora.models.prompts import PROMPT_FILES, copy_prompt_files, read_prompt_files
from minilora.tools.merging import Deviation, merge_directory

NOTABLE = 0.1  # relative error of a merge above which advice is printed
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|nan|[+-]?inf"


def add_flags(parser: Parser) -> None:
    add_model_flags(parser, many_adapters=True)
    add_out(parser)
    parser.add_argument(
        "--target",
        choices=get_args(Target),
        help="weights to merge into: original, the 16-bit weights; dequantized, the dequantized 4-bit weights that the "
        "adapter was trained on; requantized, these, quantized again (default: like the base in training)",
    )
    parser.add_argument(
        "--as-adapter", action="store_true", help="save the adapters as one adapter, not a model; needs no base model"
    )
    add_fields(parser, CombineConfig, "combination of adapters")


def run(options: Options) -> int:
    pairs = [split_weight(text) for text in options["adapter"]]
    if not pairs:
        raise ConfigError("there is nothing to merge: give --adapter")
    names, given = zip(*pairs, strict=True)
    _note_prompts(names)
    options, config = {**options, "adapter": list(names)}, from_flags(CombineConfig, options)
    weights = [1.0 if weight is None else weight for weight in given]
    with new_directory(options["out"]) as out:
        if options["as_adapter"]:
            written = _write_adapter(options, weights, config, out)
        elif config == CombineConfig() and all(weight is None for weight in given):
            written = _write_model(options, weights, None, out)
        else:
            with tempfile.TemporaryDirectory() as scratch:
                paths = [fetch(name, "adapter") for name in names]
                _print_truncation(combine_directories(paths, weights, Path(scratch), config))
                written = _write_model({**options, "adapter": list(map(str, paths))}, weights, Path(scratch), out)
    print(f"{written} written to {options['out']}")
    return 0


def split_weight(text: str) -> tuple[str, float | None]:
    """Split the name of an adapter from the weight that follows it, if there is one.

    >>> split_weight("org/name@v1:0.7"), split_weight("-"), split_weight("C:/adapters/a:-1"), split_weight("C:/7")
    (('org/name@v1', 0.7), ('-', None), ('C:/adapters/a', -1.0), ('C:/7', None))
    """
    found = re.fullmatch(rf"(.+):({NUMBER})", text, re.ASCII)
    return (text, None) if found is None or Path(text).exists() else (found[1], float(found[2]))


def _note_prompts(names: Sequence[str]) -> None:
    """Say whose prompts are kept if the adapters were trained with different ones."""
    texts = {name: read_prompt_files(fetch(name, "adapter")) for name in names}
    for file in PROMPT_FILES:
        having = [name for name, held in texts.items() if file in held]
        if len({texts[name][file] for name in having}) > 1:
            kept = f"those of {having[0]} are kept; to keep another's, name it first"
            say(f"the adapters were trained with different prompts ({file}): {kept}")


def _write_adapter(options: Options, weights: Sequence[float], config: CombineConfig, out: Path) -> str:
    """Write the adapters as one, and describe what was written."""
    unset = {"target": None, "quantize": None, "double_quant": None, "quantize_skip": None, "dtype": "auto"}
    if idle := [name for name, value in {**unset, "device": "auto"}.items() if options[name] != value]:
        flags = ", ".join(map(flag, idle))
        raise ConfigError(f"{flags}: without effect on --as-adapter, which needs no model")
    paths = [fetch(name, "adapter") for name in options["adapter"]]
    cuts = combine_directories(paths, weights, out, config, base_of(options["model"], paths))
    copy_prompt_files(paths, out)
    _print_truncation(cuts)
    return f"adapter of rank {max(cut.factors.lora_A.size(0) for cut in cuts.values())}"


def _write_model(options: Options, weights: Sequence[float], combined: Path | None, out: Path) -> str:
    """Merge the adapters, or the adapter that they were combined to, and describe the error and what was written."""
    target, found, device = options["target"], find(options), pick_device(options["device"])
    if combined is None:  # with weights, what is merged already may be added to or subtracted
        check_not_merged(found.base, found.adapters)
    quantization = _describe(found, QuantizeConfig() if target == "original" else found.quantize)
    for note in base_notes(found.base, found.adapters, quantization):
        say(note)
    trained = recorded_quantization(found.base.path, found.adapters) or found.quantize
    described = _describe(found, trained)
    is_known = all(was_trained_on(described, path) for path in found.adapters)
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
    _record_adapters(out, options["adapter"], found.adapters, weights)
    error = _describe_error(deviation, target, found.quantize, trained if is_known else None)
    return f"{error}\nmerged model"


def _record_adapters(out: Path, names: Sequence[str], adapters: Sequence[Path], weights: Sequence[float]) -> None:
    """Record in config.json which adapters the model holds, with the sum of their weights if that is not 0."""
    values = read_json(out / "config.json")
    earlier = values[MERGED] if isinstance(values.get(MERGED), list) else []
    held = {entry["sha256"]: entry for entry in earlier if isinstance(entry, dict) and "sha256" in entry}
    for name, path, weight in zip(names, adapters, weights, strict=True):
        digest = sha256_of(path / WEIGHTS_FILE)
        total = held.get(digest, {}).get("weight", 0) + weight
        held[digest] = {"name": Path(name).name, "sha256": digest, "weight": round(total, 9)}
    write_json(out / "config.json", {**values, MERGED: [entry for entry in held.values() if entry["weight"]]})


def _describe(found: Found, quantize: QuantizeConfig) -> dict[str, Any]:
    """Describe the base model as it is if it is quantized like this."""
    return describe_base(load_model(found.base.path, "auto", "meta", quantize))


def _print_truncation(cuts: Mapping[str, LowRank]) -> None:
    """Print the error of the SVD that truncated the combination, if one did."""
    deviation = Deviation.of({path: (cut.lost, cut.total) for path, cut in cuts.items()})
    if deviation.overall is not None:
        found = f"{deviation.overall:.2g}; worst {deviation.worst:.2g} in {deviation.layer}"
        print(f"truncation error, relative to the combined update: {found}")


def _describe_error(
    deviation: Deviation, target: Target | None, quantize: QuantizeConfig, trained: QuantizeConfig | None
) -> str:
    """Describe the error of a merge, and what to do about a large one; `trained` is None if it is not recorded."""
    if deviation.overall is None or deviation.worst is None:
        return "no update of low rank changes a weight, so there is no rounding error to report"
    cause, advice = "rounding", "--dtype float32 rounds less"
    if trained not in (None, QuantizeConfig() if target == "original" else quantize):
        cause, advice = "another base than in training", "without --target and --quantize the base is that of training"
    elif target == "requantized":
        cause, advice = "rounding to four bits", "--target dequantized rounds less"
    text = (
        f"{cause} changes the layers' outputs by {deviation.overall:.1%} of the adapter's effect"
        f"{'' if trained else ' on the base as loaded here'} (worst: {deviation.worst:.1%} in {deviation.layer})"
    )
    if deviation.overall > NOTABLE:
        text += f"\nthe loss usually changes far less, which `minilora eval` can measure; {advice}"
    return text
