"""What experiments share: the option `--small`, the runs with every seed, the file of what was measured."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def asks_for_small(description: str | None) -> bool:
    """Whether the script is called with `--small`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a short version, only printed")
    return parser.parse_args().small


def record_runs(script: str, runs: Sequence[Callable[[int], Any]], seeds: Sequence[int], **more: Any) -> None:
    """Call every run with every seed, and write what is known after each."""
    results = []
    for number, seed in enumerate(seeds, start=1):
        for run in runs:
            results.append(run(seed))
            print(json.dumps(results[-1]), flush=True)
            write_record(script, results, seeds[:number], **more)


def write_record(script: str, results: Sequence[Any], seeds: Sequence[int], **more: Any) -> None:
    """Write the results of a script, given as its `__file__`, beside it."""
    path = Path(script)
    told = {
        "command": f"python tutorials/experiments/{path.name}",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "seeds": list(seeds),
        **more,
    }
    lines = ",\n".join(map(json.dumps, results))
    text = f'{json.dumps(told)[:-1]}, "results": [\n{lines}\n]}}\n'
    path.with_suffix(".json").write_text(text, encoding="utf-8")
