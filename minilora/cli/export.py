"""minilora export: write an adapter's plain form, for readers that know no more than A, B and alpha / r."""

from __future__ import annotations

from pathlib import Path

from minilora.cli.command import Options
from minilora.errors import ConfigError
from minilora.storage import holds_files
from minilora.tools.export import export_adapter


def run(options: Options) -> int:
    out = Path(options["out"])
    if holds_files(out):
        raise ConfigError(f"{out}: holds files; give another --out")
    rank = export_adapter(options["adapter"], out)
    print(f"plain adapter of rank {rank} written to {out}; minilora inspect tells who reads it")
    return 0
