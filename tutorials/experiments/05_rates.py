"""Chapter 5: the loss after 100 steps at each learning rate, for full fine-tuning and LoRA at several ranks and scales.

    python tutorials/experiments/05_rates.py           the runs that 05_rates.json does not have yet
    python tutorials/experiments/05_rates.py --small   four of the runs: does the direction hold?

A curve has a method, a rank r and a scale s. The built-in model takes 100 steps of 8 rows with AdamW and the cosine
schedule; the loss is that of its 400 validation rows. Seed 0 tries a grid of rates; the other seeds try the best
one and its neighbours. Where the best rate is at an edge of what was tried, the next one is tried, too.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from record import asks_for_small, write_record

import minilora as ml
from minilora.files import ASSETS
from minilora.lora import lora_scale
from minilora.runs.evaluate import held_out_loss

FILE = Path(__file__).with_suffix(".json")
SEEDS = (0, 1, 2)
RANKS = (1, 8, 64)
ALPHA = {False: 16, True: 32**0.5}  # for α/r and α/√r: both give s = 2 at rank 8
CURVES = dict.fromkeys(  # (method, r, s)
    [("full", 0, 0.0)]
    + [("LoRA", r, round(lora_scale(r, ALPHA[root], root), 6)) for root in ALPHA for r in RANKS]
    + [("LoRA", 8, scale) for scale in (0.5, 8.0)]  # α = 4 and 64
)
GRID = {"full": range(-4, 3), "LoRA": range(-1, 4)}  # exponents k of the rates 2^k / 1000
SMALL = (-2, 2)


@functools.cache
def rows(split: str) -> ml.Dataset:
    """The rows of one split."""
    return ml.load_dataset(ASSETS / "data" / f"{split}.jsonl", ml.load_tokenizer("minilora/builtin"))


def loss_after(method: str, r: int, scale: float, exponent: int, seed: int) -> float:
    """The loss of the validation rows after a training; infinite if the training fails."""
    torch.set_num_threads(1)
    model = ml.load_model("minilora/builtin", "float32")
    if method == "LoRA":
        ml.attach(model, ml.LoraConfig(r=r, lora_alpha=scale * r), seed=seed)
    rate = 2**exponent / 1000
    config = ml.TrainConfig(batch_size=8, max_steps=100, learning_rate=rate, warmup_steps=10, seed=seed)
    try:
        ml.train(model, rows("train"), config)
    except ml.TrainingError:  # a number is not finite any more
        return float("inf")
    return held_out_loss(model, rows("valid"))


Run = tuple[str, int, float, int, int]  # method, r, s, k, seed


def missing(known: dict[Run, float]) -> Iterator[Run]:
    """The runs to make next; none when the best rate of every curve and seed has both neighbours."""
    for curve in CURVES:
        wanted = [*GRID[curve[0]]]
        for seed in SEEDS:  # each starts around the best rate of the one before
            tried = {k: loss for (*which, k, other), loss in known.items() if (*which, other) == (*curve, seed)}
            if tried.keys() >= set(wanted):
                best = min(tried, key=tried.__getitem__)
                wanted = [best - 1, best, best + 1]
            if new := [(*curve, k, seed) for k in wanted if k not in tried]:
                yield from new
                break


def main() -> None:
    """Run what is missing, a process a core, and keep each loss as it comes."""
    if asks_for_small(__doc__):
        print("learning rate  " + "  ".join(f"{2**k / 1000:g}" for k in SMALL))
        for name, curve in {"full": ("full", 0, 0.0), "LoRA, r = 8": ("LoRA", 8, 2.0)}.items():
            print(f"{name:13}  " + "  ".join(f"{loss_after(*curve, k, seed=0):.3f}" for k in SMALL))
        return
    known = {(*run,): loss for *run, loss in json.loads(FILE.read_text("utf-8"))["results"]} if FILE.is_file() else {}
    with ProcessPoolExecutor() as pool:
        while runs := list(missing(known)):
            for run, loss in zip(runs, pool.map(loss_after, *zip(*runs, strict=True)), strict=True):
                known[run] = round(loss, 5)
                write(known)
                print(*run, f"{loss:.4f}", flush=True)


def write(known: dict[Run, float]) -> None:
    """Write what is known, curve by curve and seed by seed."""
    curves = list(CURVES)
    runs = sorted(known, key=lambda run: (curves.index(run[:3]), run[4], run[3]))
    columns = ["method", "r", "scale", "k of the rate 2^k / 1000", "seed", "loss"]
    write_record(__file__, [[*run, known[run]] for run in runs], SEEDS, columns=columns)


if __name__ == "__main__":
    main()
