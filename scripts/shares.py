"""Where the time of a step goes, and that of a generated token: two tables of docs/results.md.

    python scripts/shares.py MODEL

A step is LoRA of rank 16 on all linears in bfloat16, on 4 rows of 512 tokens, as `torch.profiler` sees it. Tokens are
128 after a prompt of 32. No token takes less time than reading all weights once.
"""

import argparse
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

import minilora.public as ml
from minilora.data import collate
from minilora.training import adamw, train_step

sys.path.insert(0, str(Path(__file__).parents[1]))
from recipes.int8_weights import decode_in_int8  # the checkout is no installed package

RANK, ROWS, LENGTH = 16, 4, 512
PROMPT, NEW = 32, 128
KINDS = {
    "products in attention": "baddbmm|bmm",
    "softmax": "_softmax.*",
    "copies and conversions": "copy_|cat",
    "elementwise operations": "(add|sub|mul|div|silu|rsqrt|neg)_?|silu_backward",
}


def kind_of(event: Any) -> str:
    """Return the kind of an operation; a product with a side of 16 is one with A or B, as no weight has such a side."""
    name = event.key.removeprefix("aten::")
    if re.fullmatch("mm|addmm_?", name):
        is_low_rank = any(RANK in shape for shape in event.input_shapes)
        return "products with A and B" if is_low_rank else "products with W and the head"
    return next((kind for kind, names in KINDS.items() if re.fullmatch(names, name)), "all else")


def shares_of_step(model: Any) -> Mapping[str, float]:
    """Return the share of each kind of operation in the time of two steps, after one that does not count."""
    ml.attach(model, ml.LoraConfig(r=RANK))
    optimizer = adamw([parameter for parameter in model.parameters() if parameter.requires_grad])
    row = torch.arange(LENGTH).tolist()
    batch = collate([ml.Example(row, row)] * ROWS, torch.device("cpu"))
    train_step(model, optimizer, [batch])
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        for _ in range(2):
            train_step(model, optimizer, [batch])
    times: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages(group_by_input_shape=True):
        times[kind_of(event)] += event.self_cpu_time_total
    return {kind: taken / sum(times.values()) for kind, taken in times.items()}


def median_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the median time of some work, after once that does not count."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def reading_speed() -> float:
    """Return the bytes that all threads read in a second."""
    numbers = torch.ones(2**28)
    return numbers.nbytes / median_seconds(numbers.amax)


def seconds_of_products(model: Any) -> float:
    """Return the time of the products of one row with all weights, and of nothing else."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    rows = {weight.size(1): torch.ones(1, weight.size(1), dtype=weight.dtype) for weight in weights}
    with torch.no_grad():
        return median_seconds(lambda: [F.linear(rows[weight.size(1)], weight) for weight in weights])


def seconds_a_token(model: Any, rows: int) -> float:
    """Return the time of one decoding step: that of `NEW` tokens, less that of the prompts."""
    prompts = torch.randint(model.config.vocab_size, (rows, PROMPT)).tolist()
    long, short = (median_seconds(lambda n=n: ml.generate(model, prompts, n), 3) for n in (NEW, 1))  # type: ignore[misc]
    return (long - short) / (NEW - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    path = parser.parse_args().model
    print("| of a step | share |\n|---|---|")
    for kind, share in sorted(shares_of_step(ml.load_model(path, "bfloat16")).items(), key=lambda item: -item[1]):
        print(f"| {kind} | {share:.1%} |")
    speed = reading_speed()
    model = ml.load_model(path, "bfloat16")
    print(f"\nreading: {speed / 1e9:.1f} GB a second; one row times all weights: {seconds_of_products(model):.4f} s\n")
    print("| weights | rows | tokens a second | best time over its time |\n|---|---|---|---|")
    for dtype in ("bfloat16", "int8, by the recipe"):
        if dtype != "bfloat16":
            decode_in_int8(model.model)
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        for rows in (1, 8):
            taken = seconds_a_token(model, rows)
            print(f"| {dtype} | {rows} | {rows / taken:.1f} | {size / speed / taken:.2f} |")


if __name__ == "__main__":
    main()
