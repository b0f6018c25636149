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
from minilora.tools.selftest import Row, selftest


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="device to check: cpu, cuda, mps (default: auto)")
    dtypes = ("float64", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="dtype to check (default: float32)")


def run(options: Options) -> int:
    device = pick_device(options["device"])
    print(f"PyTorch {torch.__version__}, {device}, {options['dtype']}, {torch.get_num_threads()} threads")
    print(f"{'law':28} {'definitions':>11} {'kernels':>9}  verdict")
    broken = []
    for row in selftest(device, options["dtype"]):
        broken += [row.failure] if row.failure else []
        print(_line(row), flush=True)
    print("\n".join(["", *broken]) if broken else "every law holds")
    return 1 if broken else 0


def _line(row: Row) -> str:
    definitions = "" if row.definitions is None else f"{row.definitions:.3f}"
    return f"{row.law:28} {definitions:>11} {row.kernels:9.3f}  {'BROKEN' if row.failure else 'holds'}"
