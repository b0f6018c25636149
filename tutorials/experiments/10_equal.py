"""Chapter 10: forgetting and intruder dimensions, where full fine-tuning learns or forgets as much as LoRA.

    python tutorials/experiments/10_equal.py     writes 10_equal.json, after each method and size

Task and settings are those of sizes.py, where LoRA and full fine-tuning have their best rates. Here are

    full, half rate     half of its best rate
    LoRA                its best rate, again
    full, equal loss    at each seed a rate with LoRA's loss on the test rows, within the tolerance
    full, equal KL      at each seed a rate with LoRA's KL on general text, within the tolerance

Loss and KL of each row are those of sizes.py, and the intruder dimensions among the first ten of each linear those of
10_forgetting.py. Claims and settings are those of plans.json; LoRA at other sizes is read from sizes.json.
"""

from __future__ import annotations

import itertools
import math
import runpy
from pathlib import Path
from typing import Any

import torch
from record import file_hashes, plan_hash, read_plan, write_record

import minilora as ml
from minilora.files import ASSETS
from minilora.llama import Llama
from minilora.runs.evaluate import held_out_loss, measure_forgetting

HERE, PLAN = Path(__file__).parent, read_plan(__file__)
SIZES, FORGETTING = (runpy.run_path(str(HERE / name)) for name in ("sizes.py", "10_forgetting.py"))
FILES = file_hashes(
    *(__file__, HERE / "sizes.py", HERE / "10_forgetting.py", HERE.parents[1] / "scripts" / "make_dates.py"),
    *(ASSETS / "data" / "general.jsonl", ASSETS / "model" / "model.safetensors"),
)
linears, intruders = FORGETTING["linears"], FORGETTING["intruders"]
Outcomes = dict[str, list[int]]


def score(model: Llama) -> Outcomes:
    """What becomes of each row, and of each linear."""
    base = SIZES["base"]
    pairs = zip(linears(model).values(), linears(base).values(), strict=True)
    return {
        "loss": [round(1e4 * held_out_loss(model, [row])) for row in SIZES["test"]],
        "kl": [round(1e4 * measure_forgetting(model, [row], base=base).kl) for row in SIZES["general"]],
        "intruders": [intruders(after.weight.detach(), before.weight.detach())[0] for after, before in pairs],
    }


def measure(method: str, rows: int, rate: float, seed: int) -> Outcomes:
    model = SIZES["fit"](method, rows, rate, seed)
    if method == "LoRA":
        ml.merge(model)
    return score(model)


def match(key: str, lora: Outcomes, known: dict[float, Outcomes], rows: int, seed: int) -> float:
    """Return a rate of full fine-tuning whose mean is LoRA's, and add all that are tried to the known ones.

    The next rate to try comes from a straight line, in logarithms, between two known ones that enclose it.
    """
    while True:
        distance = {rate: math.log(sum(of[key]) / sum(lora[key])) for rate, of in sorted(known.items())}
        best = min(distance, key=lambda rate: abs(distance[rate]))
        if abs(distance[best]) < PLAN["tolerance"]:
            return best
        low, high = next(pair for pair in itertools.pairwise(distance) if distance[pair[0]] * distance[pair[1]] < 0)
        share = distance[low] / (distance[low] - distance[high])
        rate = low * (high / low) ** min(0.9, max(0.1, share))
        known[rate] = measure("full", rows, rate, seed)


def main() -> None:
    """Run all, and write what is known after each method and size."""
    results: list[dict[str, Any]] = []

    def keep(method: str, rows: int, rates: list[float], outcomes: list[Outcomes]) -> list[Outcomes]:
        results.append({"method": method, "rows": rows, "rates": rates, "outcomes": outcomes})
        write_record(__file__, results, PLAN["seeds"], plan=plan_hash(PLAN), files=FILES)
        print(method, rows, rates, [round(sum(of["kl"]) / 1e4 / len(of["kl"]), 3) for of in outcomes], flush=True)
        return outcomes

    def run(method: str, name: str, rows: int, rate: float) -> list[Outcomes]:
        outcomes = [measure(method, rows, rate, seed) for seed in PLAN["seeds"]]
        return keep(name, rows, [rate] * len(outcomes), outcomes)

    half, best = PLAN["full_rates"]
    halves = {rows: run("full", "full, half rate", rows, half) for rows in PLAN["rows"]}
    rows = PLAN["matched_rows"]
    lora = run("LoRA", "LoRA", rows, PLAN["lora_rate"])
    known = [{half: halves[rows][i]} for i in range(len(lora))]
    for i, seed in enumerate(PLAN["seeds"]):
        for rate in (PLAN["lowest_rate"], best):
            known[i][rate] = measure("full", rows, rate, seed)
    for name, key in (("loss", "loss"), ("KL", "kl")):
        rates = [match(key, lora[i], known[i], rows, seed) for i, seed in enumerate(PLAN["seeds"])]
        keep(f"full, equal {name}", rows, rates, [known[i][rate] for i, rate in enumerate(rates)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
