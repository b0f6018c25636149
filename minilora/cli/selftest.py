"""Check the laws of LoRA on this machine, by the definitions and by the kernels.

Each law compares results with a float64 oracle. The numbers are the largest
error in relation to its derived bound: 1 is the limit. The exit status is 1 if
a law is broken.

Example:
  minilora selftest --dtype bfloat16
"""

from __future__ import annotations

import argparse

import torch

from minilora.cli import Options
from minilora.models.checkpoint import pick_device
from minilora.tools.selftest import Row, not_run, selftest


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="device to check: cpu, cuda, mps (default: auto)")
    dtypes = ("float64", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="dtype to check (default: float32)")


def run(options: Options) -> int:
    device, threads = pick_device(options["device"]), torch.get_num_threads()
    print(f"PyTorch {torch.__version__}, {device}, {options['dtype']}, {threads} thread{'s' * (threads > 1)}")
    print("largest error / derived bound; 1 is the limit")
    print(f"{'law':36} {'definitions':>11} {'kernels':>9}  verdict")
    rows = []
    for row in selftest(device, options["dtype"]):
        rows.append(row)
        print(_line(row, options["dtype"]), flush=True)
    broken = [row.failure for row in rows if row.failure]
    kernels = sum(row.definitions is None for row in rows)
    held = f"{len(rows) - kernels} laws and {kernels} kernels hold; not run here: {', '.join(not_run(device))}"
    print("\n".join(["", *broken]) if broken else held)
    return 1 if broken else 0


def _line(row: Row, dtype: str) -> str:
    law = row.law if row.dtype == dtype else f"{row.law} ({row.dtype})"
    definitions = "" if row.definitions is None else f"{row.definitions:.3f}"
    return f"{law:36} {definitions:>11} {row.kernels:9.3f}  {'BROKEN' if row.failure else 'holds'}"
