"""The tables of docs/results.md: definitions to categories, over three seeds.

    python scripts/definitions.py                              the built-in model
    python scripts/definitions.py --model DIR --data minilora/builtin [more flags]

Flags are those of `minilora finetune`.
"""

import json
import sys
import tempfile
from pathlib import Path

from minilora.cli import main

SEEDS = (0, 1, 2)


def run(flags: list[str]) -> None:
    """Fine-tune once for each seed and print one row of the table for each."""
    print("| seed | accuracy before | after | held-out loss before | after | seconds of training |")
    print("|---|---|---|---|---|---|")
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "run"
            if main(["finetune", "--out", str(out), "--seed", str(seed), *flags]):
                sys.exit(1)
            summary = json.loads((out / "summary.json").read_text())
        before, after = summary["before"], summary["after"]
        accuracies, losses = (f"{before[key]:.3f} | {after[key]:.3f}" for key in ("accuracy", "loss"))
        print(f"| {seed} | {accuracies} | {losses} | {summary['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    run(sys.argv[1:])
