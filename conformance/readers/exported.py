"""Adapters of the kit as `minilora export` writes them for a program, for its reader."""

import sys
from collections.abc import Sequence
from pathlib import Path

from minilora.cli import main as minilora


def exported(base: Path, adapters: Sequence[Path], program: str, out: Path) -> list[Path]:
    """Return the directory of one adapter in place of all, or end as `minilora export` does if it refuses them."""
    if not adapters:
        return []
    words = ["export", f"--model={base}", *(f"--adapter={path}" for path in adapters)]
    if status := minilora([*words, f"--for={program}", f"--out={out}"]):
        sys.exit(status)
    return [out]
