"""Export adapters of the kit for another program, whose reader then reads the result."""

import sys
from collections.abc import Sequence
from pathlib import Path

from minilora.cli import main as minilora


def exported(base: Path, adapters: Sequence[Path], program: str, out: Path) -> list[Path]:
    """Return the directory of the exported adapter; if `minilora export` refuses, exit with its status."""
    if not adapters:
        return []
    arguments = [f"--model={base}", *(f"--adapter={path}" for path in adapters), f"--for={program}", f"--out={out}"]
    if status := minilora(["export", *arguments]):
        sys.exit(status)
    return [out]
