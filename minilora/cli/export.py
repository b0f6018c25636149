"""Export an adapter in a plain form that more tools can read.

Scales are folded into B, all modules get the same rank, and alpha = r. The
result computes the same, also in tools that ignore rsLoRA and rank patterns.

Example:
  minilora export --adapter run --out plain
"""

from __future__ import annotations

import argparse

from minilora.cli import Options
from minilora.cli.flags import add_out, new_directory
from minilora.tools.export import export_adapter


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, help="directory or hub id of the adapter")
    add_out(parser)


def run(options: Options) -> int:
    with new_directory(options["out"]) as out:
        rank = export_adapter(options["adapter"], out)
    print(f"plain adapter of rank {rank} written to {options['out']}")
    return 0
