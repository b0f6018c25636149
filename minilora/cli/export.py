"""Write an adapter in a plain form that more readers understand.

Scales are folded into B, all modules have one rank, and alpha = r. It computes
the same as before, also in readers that ignore rsLoRA and patterns.

Example:
  minilora export --adapter run --out plain
"""

from __future__ import annotations

import argparse
from pathlib import Path

from minilora.cli import Options
from minilora.errors import ConfigError
from minilora.storage import holds_files
from minilora.tools.export import export_adapter


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, help="directory of the adapter, or its name on the hub")
    parser.add_argument("--out", required=True, help="directory to write; it must not hold files")


def run(options: Options) -> int:
    out = Path(options["out"])
    if holds_files(out):
        raise ConfigError(f"{out}: holds files; give another --out")
    rank = export_adapter(options["adapter"], out)
    print(f"plain adapter of rank {rank} written to {out}")
    return 0
