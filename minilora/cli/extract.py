"""minilora extract: the adapter between two models."""

from __future__ import annotations

from pathlib import Path

from minilora.adapters.config import RENAMED, LoraConfig
from minilora.cli.command import Options
from minilora.cli.commands import EXTRACT_FIELDS
from minilora.errors import ConfigError
from minilora.models.tokenizer import find_tokenizer
from minilora.runs.run import pick_device
from minilora.storage import holds_files
from minilora.tools.extraction import Extraction, extract_directory


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
