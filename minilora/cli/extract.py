"""Write the adapter between a model and another one that was tuned from it.

It is the best approximation of their difference that its rank allows.

Example:
  minilora extract --base model --tuned tuned-model --lora-r 32 --out adapter
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from minilora.adapters.config import RENAMED, LoraConfig
from minilora.cli import Options
from minilora.cli.flags import add_fields
from minilora.errors import ConfigError
from minilora.models.tokenizer import find_tokenizer
from minilora.runs.run import pick_device
from minilora.storage import holds_files
from minilora.tools.extraction import Extraction, extract_directory

EXTRACT_FIELDS = ("r", "target_modules", "exclude_modules", "rank_pattern")  # of LoraConfig, that count here


def add_flags(parser: argparse.ArgumentParser) -> None:
    for name, meaning in (("base", "the model that was tuned"), ("tuned", "what became of it")):
        parser.add_argument(
            f"--{name}", required=True, help=f"{meaning}: a directory, or org/name[@revision] of the Hugging Face hub"
        )
    parser.add_argument("--out", required=True, help="directory to write; it must not hold files")
    parser.add_argument("--device", default="auto", help="where to compute it: cpu, cuda, mps (default: auto)")
    others = [field.name for field in dataclasses.fields(LoraConfig) if field.name not in EXTRACT_FIELDS]
    add_fields(parser, LoraConfig, "adapter", but=others)
    parser.add_argument(
        "--svd-energy", type=float, metavar="X", help="share of each module's squares to keep, if a lower rank will do"
    )


def run(options: Options) -> int:
    out, energy = Path(options["out"]), options["svd_energy"]
    if holds_files(out):
        raise ConfigError(f"{out}: holds files; give another --out")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"svd_energy is {energy}, need a number above 0, at most 1")
    config = LoraConfig(**{name: options[RENAMED.get(name, name)] for name in EXTRACT_FIELDS})
    tokenizer = find_tokenizer(options["tuned"])
    device = pick_device(options["device"])
    found = extract_directory(options["base"], options["tuned"], out, config, energy, device)
    if tokenizer:
        tokenizer.save(out)
    print(f"{_in_words(found)}\nadapter written to {out}")
    return 0


def _in_words(found: Extraction) -> str:
    deviation = found.deviation
    words = (
        f"error of the cut, relative to the change of the adapted weights: {deviation.overall:.2g}; "
        f"worst {deviation.worst:.2g} in {deviation.layer}"
    )
    if found.left_out:
        more = " …" if len(found.left_out) > 3 else ""
        words += (
            f"\nnot in the adapter: {len(found.left_out)} other weights that differ, with {found.share:.0%} of all "
            f"changes' squares: {', '.join(found.left_out[:3])}{more}"
        )
    return words
