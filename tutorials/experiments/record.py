"""What experiments share: their options, the runs with every seed, the file of what was measured."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

LARGE = "10M"  # the name in a record of the model of scripts/pretrain.py --large


def read_plan(script: str) -> dict[str, Any]:
    """Return the plan of a script, given as its `__file__`: settings, claims and margins, fixed before its run."""
    path = Path(script)
    return json.loads(path.with_name("plans.json").read_text(encoding="utf-8"))[path.stem]


def plan_hash(plan: dict[str, Any]) -> str:
    """Return a name of what a plan says, which the file of its run holds."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that knows `--small`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a short version, only printed")
    return parser


def asks_for_small(description: str | None) -> bool:
    """Whether the script is called with `--small`."""
    return make_parser(description).parse_args().small


def read_arguments(description: str | None) -> argparse.Namespace:
    """Return `small` and `model`, of a script that can measure another model and add it to its file."""
    parser = make_parser(description)
    parser.add_argument("--model", metavar="DIR", help="measure this one, of scripts/pretrain.py --large")
    return parser.parse_args()


def record_runs(script: str, runs: Sequence[Callable[[int], Any]], seeds: Sequence[int], **more: Any) -> None:
    """Call every run with every seed, and write what is known after each."""
    results = []
    for number, seed in enumerate(seeds, start=1):
        for run in runs:
            results.append(run(seed))
            print(json.dumps(results[-1]), flush=True)
            write_record(script, results, seeds[:number], **more)


def write_record(script: str, results: Sequence[Any], seeds: Sequence[int], **more: Any) -> None:
    """Write the results of a script, given as its `__file__`, beside it; what `add_to_record` has added there stays."""
    path = Path(script)
    file = path.with_suffix(".json")
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    told = {
        "command": f"python tutorials/experiments/{path.name}",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "seeds": list(seeds),
        **more,
    }
    if LARGE in earlier:
        told[LARGE] = earlier[LARGE]
    write(file, told, results)


def add_to_record(script: str, measured: Any) -> None:
    """Add what was measured of the large model to the file that a script has written."""
    path = Path(script).with_suffix(".json")
    told = json.loads(path.read_text(encoding="utf-8"))
    results = told.pop("results")
    write(path, told | {LARGE: measured}, results)


def write(path: Path, told: dict[str, Any], results: Sequence[Any]) -> None:
    """Write one line of what is told about the results, and one for each result."""
    lines = ",\n".join(map(json.dumps, results))
    text = f'{json.dumps(told)[:-1]}, "results": [\n{lines}\n]}}\n'
    path.write_text(text, encoding="utf-8")
