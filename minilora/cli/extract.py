"""Extract an adapter from a fine-tuned model and its base model.

The adapter is the best approximation of their difference at its rank.

Example:
  minilora extract --base model --tuned tuned-model --lora-r 32 --out adapter
"""

from __future__ import annotations

import argparse
import dataclasses

from minilora.adapters.config import RENAMED, LoraConfig
from minilora.cli import Options
from minilora.cli.flags import add_fields, add_out, new_directory
from minilora.errors import ConfigError
from minilora.models.checkpoint import pick_device
from minilora.models.tokenizer import find_tokenizer
from minilora.tools.extraction import Extraction, extract_directory

EXTRACT_FIELDS = ("r", "target_modules", "exclude_modules", "rank_pattern")  # those of LoraConfig that apply here


def add_flags(parser: argparse.ArgumentParser) -> None:
    for name, meaning in (("base", "base model"), ("tuned", "fine-tuned model")):
        parser.add_argument(
            f"--{name}", required=True, help=f"{meaning}: a directory, or org/name[@revision] on the Hugging Face Hub"
        )
    add_out(parser)
    parser.add_argument("--device", default="auto", help="device to compute on: cpu, cuda, mps (default: auto)")
    others = [field.name for field in dataclasses.fields(LoraConfig) if field.name not in EXTRACT_FIELDS]
    add_fields(parser, LoraConfig, "adapter", but=others)
    energy = "reduce the rank of a module as far as it keeps this share of its squared singular values"
    parser.add_argument("--svd-energy", type=float, metavar="X", help=energy)


def run(options: Options) -> int:
    energy = options["svd_energy"]
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"svd_energy is {energy}, need a number above 0, at most 1")
    config = LoraConfig(**{name: options[RENAMED.get(name, name)] for name in EXTRACT_FIELDS})
    tokenizer = find_tokenizer(options["tuned"])
    device = pick_device(options["device"])
    with new_directory(options["out"]) as out:
        found = extract_directory(options["base"], options["tuned"], out, config, energy, device)
        if tokenizer:
            tokenizer.save(out)
    print(f"{_describe(found)}\nadapter written to {options['out']}")
    return 0


def _describe(found: Extraction) -> str:
    deviation = found.deviation
    text = (
        f"truncation error, relative to the change of the adapted weights: {deviation.overall:.2g}; "
        f"worst {deviation.worst:.2g} in {deviation.layer}"
    )
    if found.left_out:
        more = " …" if len(found.left_out) > 3 else ""
        text += (
            f"\nnot in the adapter: {len(found.left_out)} other weights that differ, with {found.share:.0%} of the "
            f"squared change of all: {', '.join(found.left_out[:3])}{more}"
        )
    return text
