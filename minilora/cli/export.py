"""minilora export: write an adapter's plain form, for readers that know no more than A, B and alpha / r."""

from __future__ import annotations

import argparse
from pathlib import Path

from minilora.cli.command import Command, Options
from minilora.errors import ConfigError
from minilora.lora.export import export_adapter
from minilora.storage import holds_files


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, help="directory of the adapter, or its name on the hub")
    parser.add_argument("--out", required=True, help="directory to write; it must not hold files")


def _run(options: Options) -> int:
    out = Path(options["out"])
    if holds_files(out):
        raise ConfigError(f"{out}: holds files; give another --out")
    rank = export_adapter(options["adapter"], out)
    print(f"plain adapter of rank {rank} written to {out}; minilora inspect tells who reads it")
    return 0


COMMAND = Command(
    name="export",
    help="write an adapter in a plain form that more readers understand",
    about="Write an adapter in a plain form: scales folded into B, one rank for all modules, alpha = r. "
    "It does the same as before, also in readers that take no notice of rsLoRA and of patterns.",
    example="minilora export --adapter run --out plain",
    add_flags=_add_flags,
    run=_run,
)
