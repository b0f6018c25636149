"""Chapter 13: the directions of a change of the weights, how many of them other runs share, and what it amplifies.

    python tutorials/experiments/13_inside.py     writes 13_inside.json

The built-in model takes 100 steps of 8 rows: adapters of rank 8 and 64 on all linears, α = 16, with the rate that did
best in chapter 5's sweep (05_rates.json), and full fine-tuning of the same linears with its own best rate. A run has a
seed for its start and one for the order of its rows. M = U Σ Vᵀ, and Uᵢ are the first i columns of U.

    φ(M, N, i, j) = ‖Uᵢᵀ U'ⱼ‖² / min(i, j)     [LoRA §7.2]; random directions have max(i, j)/n on average
    size k, inside k: ‖ΔW cut to rank k‖ and ‖Uₖᵀ W Vₖ‖; own k, chance k: the latter for the first k directions of W
    itself, and for random ones, k·‖W‖/√(out·in)     [LoRA §7.3]
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
from collections.abc import Iterable
from typing import Any

import torch
from record import write_record
from torch import Tensor, nn

import minilora as ml
from minilora.files import ASSETS
from minilora.lora import lora_delta

SEEDS = (0, 1, 2)
RATES = {"LoRA 8": 4e-3, "LoRA 64": 4e-3, "full": 5e-4}
RUNS = [(method, seed, seed) for method in RATES for seed in SEEDS]  # method, seed of the start, of the order
RUNS += [("LoRA 8", seed, (seed + 1) % 3) for seed in SEEDS]
CUTS = (1, 4, 8)
GRID = (8, 32)  # up to these, i and j of the picture
Change = dict[str, dict[str, Tensor]]  # layer -> its `delta`, and of an adapter `A` and its `start`


@functools.cache
def rows(split: str) -> ml.Dataset:
    return ml.load_dataset(ASSETS / "data" / f"{split}.jsonl", ml.load_tokenizer("minilora/builtin"))


def weights() -> dict[str, Tensor]:
    """The weights of the linears of the blocks, by name."""
    model = ml.load_model("minilora/builtin", "float32").model
    return {name: each.weight.detach() for name, each in model.named_modules() if isinstance(each, nn.Linear)}


def train(method: str, start: int, order: int) -> Change:
    """The change of each linear after a run."""
    model = ml.load_model("minilora/builtin", "float32")
    before = weights()
    if method == "full":
        for name, parameter in model.model.named_parameters():
            parameter.requires_grad_(name.removesuffix(".weight") in before)
    else:
        ml.attach(model, ml.LoraConfig(r=int(method.split()[1]), lora_alpha=16), seed=start)
    layers = {name: model.model.get_submodule(name) for name in before}
    adapted = {} if method == "full" else layers
    starts = {name: layer.adapters["default"].lora_A.detach().clone() for name, layer in adapted.items()}
    settings = {"batch_size": 8, "max_steps": 100, "warmup_steps": 10}
    ml.train(model, rows("train"), ml.TrainConfig(learning_rate=RATES[method], seed=order, **settings))
    if method == "full":
        return {name: {"delta": layer.weight.detach() - before[name]} for name, layer in layers.items()}
    found = {}
    for name, layer in layers.items():
        adapter = layer.adapters["default"]
        A = adapter.lora_A.detach()
        found[name] = {"delta": lora_delta(A, adapter.lora_B.detach(), adapter.scale), "A": A, "start": starts[name]}
    return found


def directions(M: Tensor, side: str) -> Tensor:
    """The singular vectors of one side, the columns of U (`out`) or of V (`in`)."""
    U, _, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    return U if side == "out" else Vh.T


def overlap(U: Tensor, V: Tensor, i: int, j: int) -> float:
    """φ(i, j): how much of the smaller subspace lies in the larger, from 0 to 1."""
    return (U[:, :i].T @ V[:, :j]).square().sum().item() / min(i, j)


def mean(numbers: Iterable[float]) -> float:
    return round(statistics.mean(numbers), 4)


def compare(one: Change, two: Change, names: list[str]) -> dict[str, Any]:
    """φ of two changes, for the directions of output, of input, and of A as in the paper, as means over layers."""
    found: dict[str, Any] = {}
    for side, key in (("out", "delta"), ("in", "delta"), ("A", "A")):
        if key not in one[names[0]] or key not in two[names[0]]:
            continue
        first, second = ({name: directions(run[name][key], side) for name in names} for run in (one, two))
        for i, j in ((1, 1), (8, 8)):
            found[f"{side} {i},{j}"] = mean(overlap(first[name], second[name], i, j) for name in names)
    return found


def describe(change: Change, before: dict[str, Tensor], names: list[str]) -> dict[str, Any]:
    """The ranks for 90 % of the energy, how far A has turned, and what of W lies in the directions of ΔW."""
    parts = {name: torch.linalg.svd(change[name]["delta"].double(), full_matrices=False) for name in names}
    found: dict[str, Any] = {}

    def rank(name: str) -> float:
        energy = parts[name].S.square().cumsum(0)
        return float((energy < 0.9 * energy[-1]).sum() + 1)

    def size(name: str, k: int) -> float:
        return parts[name].S[:k].norm().item()

    def inside(name: str, k: int) -> float:
        U, _, Vh = parts[name]
        return (U[:, :k].T @ before[name].double() @ Vh[:k].T).norm().item()

    def by_chance(name: str, k: int) -> float:
        return k * before[name].norm().item() / before[name].numel() ** 0.5

    def own(name: str, k: int) -> float:
        return torch.linalg.svdvals(before[name].double())[:k].norm().item()

    found["rank"] = mean(rank(name) for name in names)
    found["W"] = mean(before[name].norm().item() for name in names)
    found["delta"] = mean(change[name]["delta"].norm().item() for name in names)
    for k in CUTS:
        for key, value in {"size": size, "inside": inside, "chance": by_chance, "own": own}.items():
            found[f"{key} {k}"] = mean(value(name, k) for name in names)
    if "A" in change[names[0]]:
        A = {name: (directions(change[name]["A"], "in"), directions(change[name]["start"], "in")) for name in names}
        r = next(iter(A.values()))[0].shape[1]
        found["A kept"] = mean(overlap(*A[name], r, r) for name in names)

        def moved(name: str) -> float:
            A, start = change[name]["A"], change[name]["start"]
            return ((A - start).norm() / start.norm()).item()

        found["A moved"] = mean(moved(name) for name in names)
    return found


def main() -> None:
    """Run all, compare them in pairs, and write it."""
    before = weights()
    kinds = {
        "q_proj": [name for name in before if name.endswith("q_proj")],
        "v_proj": [name for name in before if name.endswith("v_proj")],
        "all": list(before),
    }
    changes: dict[tuple[str, int, int], Change] = {}
    results: list[dict[str, Any]] = []
    for run in RUNS:
        changes[run] = train(*run)
        for kind, names in kinds.items():
            results.append({"run": run, "kind": kind, **describe(changes[run], before, names)})
        print(json.dumps(results[-1]), flush=True)
    for one, two in itertools.combinations(RUNS, 2):
        for kind, names in kinds.items():
            results.append({"pair": [one, two], "kind": kind, **compare(changes[one], changes[two], names)})
    one, two = changes[RUNS[0]], changes["LoRA 64", 1, 1]
    for kind in ("q_proj", "v_proj"):
        for side in ("out", "in"):
            U, V = ({name: directions(run[name]["delta"], side) for name in kinds[kind]} for run in (one, two))
            grid = [
                [mean(overlap(U[name], V[name], i, j) for name in kinds[kind]) for j in range(1, GRID[1] + 1)]
                for i in range(1, GRID[0] + 1)
            ]
            results.append({"grid": grid, "kind": kind, "side": side})
    write_record(__file__, results, SEEDS)


if __name__ == "__main__":
    main()
