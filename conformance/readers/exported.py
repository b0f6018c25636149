"""Export adapters of the kit for another program, whose reader then reads the result; several become their sum."""

import sys
from collections.abc import Sequence
from pathlib import Path

import minilora as ml
from minilora.cli import main as minilora


def exported(base: Path, adapters: Sequence[Path], program: str, out: Path) -> list[Path]:
    """Return the directory of the exported adapter; if `minilora export` refuses, exit with its status."""
    if not adapters:
        return []
    adapter = adapters[0] if len(adapters) == 1 else summed(base, adapters, out.with_name("sum"))
    arguments = [f"--model={base}", f"--adapter={adapter}", f"--for={program}", f"--out={out}"]
    if status := minilora(["export", *arguments]):
        sys.exit(status)
    return [out]


def summed(base: Path, adapters: Sequence[Path], out: Path) -> Path:
    """Write the sum of several adapters as one."""
    model = ml.load_model(base)
    names = [f"part{i}" for i in range(len(adapters))]
    for name, path in zip(names, adapters, strict=True):
        ml.load_adapter(model, path, name=name)
    ml.combine_adapters(model, dict.fromkeys(names, 1.0), "sum")
    ml.save_adapter(model, out, name="sum")
    return out
