"""What experiments share: their options, the runs with every seed, the file of what was measured."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 8: 2.365}  # t of the 95 % interval of the mean of as many seeds
ROOT = Path(__file__).resolve().parents[2]
LARGE = "10M"  # the name in a record of the model of scripts/pretrain.py --large


def read_plan(script: str) -> dict[str, Any]:
    """Return the plan of a script, given as its `__file__`: settings, claims and margins, fixed before its run."""
    path = Path(script)
    return json.loads(path.with_name("plans.json").read_text(encoding="utf-8"))[path.stem]


def plan_hash(plan: dict[str, Any]) -> str:
    """Return a name of what a plan says, which the file of its run holds."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


def file_hashes(*paths: str | Path) -> dict[str, str]:
    """Return hashes of files that a run depends on, by their paths in the repository; to be read before it starts."""
    files = [Path(path).resolve() for path in paths]
    return {file.relative_to(ROOT).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}


def paired_interval(ones: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the mean of ones - others, (seeds, rows), and half of its 95 % interval over both seeds and rows.

    half² = (t · sd of the seeds' means / √seeds)² + (1.96 · sd of the rows' means / √rows)². Noise that belongs to one
    seed and one row is in both terms, so the interval is rather too wide than too narrow.
    """
    more = [[one - other for one, other in zip(*pair, strict=True)] for pair in zip(ones, others, strict=True)]
    seeds = [statistics.mean(row) for row in more]
    rows = [statistics.mean(column) for column in zip(*more, strict=True)]
    over_rows = 1.96 * statistics.stdev(rows) / len(rows) ** 0.5
    return statistics.mean(seeds), (seed_interval(seeds)[1] ** 2 + over_rows**2) ** 0.5


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of one value per seed, and half of its 95 % interval by Student's t."""
    return statistics.mean(values), STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def verdict(expected: str, more: float, half: float, margin: float = 0.0) -> str:
    """Return what the interval more ± half says of a source that expects "above" or "below" zero, or "equal"."""
    if expected == "equal":
        inside, outside = abs(more) + half < margin, abs(more) - half > margin
    else:
        sign = {"above": 1, "below": -1}[expected]
        inside, outside = sign * more - half > 0, sign * more + half < 0
    return "reproduced" if inside else "not reproduced" if outside else "undecided"


def p_value(more: float, half: float, seeds: int, margin: float = 0.0) -> float:
    """Return the two-sided p of an interval, read as Student's t of as many seeds: below 0.05 if it decides."""
    return student_tail((abs(more) - margin) * STUDENT[seeds] / half, seeds - 1)


def student_tail(t: float, degrees: int) -> float:
    """Return the probability that Student's t is farther from zero than t (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / degrees**0.5)
    term, total = (math.cos(angle), 0.0) if degrees % 2 else (1.0, 0.0)
    for power in range(2 + degrees % 2, degrees + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power - 1) / power
    total *= math.sin(angle)
    return 1 - (2 / math.pi * (angle + total) if degrees % 2 else total)


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
