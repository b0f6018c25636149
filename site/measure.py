"""Measure the explorer's model over scales, ranks, bits and places; the page shows the first three as curves.

It takes some minutes, so the results are kept in `site/curves.json`.

    python site/measure.py
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from pack import CURVES, load_adapted, train
from torch import Tensor, nn

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.files import ASSETS
from minilora.runs.evaluate import choice_accuracy, find_choices, measure_forgetting

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)  # times the trained one
RANKS = (1, 2, 3, 4, 6, 8, 12, 16)
BITS = (16, 8, 4, 3, 2)
PARTS = ("self_attn", "mlp", *(f"layers.{number}" for number in range(5)))
BLOCK_SIZE = 64


def levels(bits: int) -> Tensor:
    """Return the levels of a code: even ones in eight bits, otherwise NF4's construction with 2^bits quantiles."""
    if bits == 8:
        return torch.arange(-127, 128) / 127
    if bits == 4:
        return torch.tensor(ml.nf4.LEVELS)
    outermost = 1 - (1 / (2 * (2**bits - 1)) + 1 / (2 * 2**bits)) / 2
    below = torch.linspace(1 - outermost, 0.5, 2 ** (bits - 1), dtype=torch.float64)
    above = torch.linspace(0.5, outermost, 2 ** (bits - 1) + 1, dtype=torch.float64)
    quantiles = torch.special.ndtri(torch.cat([below[:-1], above]))
    return (quantiles / quantiles[-1]).float()


def round_weight(weight: Tensor, bits: int) -> Tensor:
    """Round each number of a weight to the nearest level of its block."""
    if bits == 16:
        return weight
    blocks = weight.reshape(-1, BLOCK_SIZE)
    absmax = blocks.abs().amax(1, keepdim=True)
    code = levels(bits)
    nearest = torch.bucketize(blocks * absmax.reciprocal(), ml.nf4.midpoints(code))
    return (code[nearest] * absmax).view_as(weight)


def build_measure() -> Callable[..., list[float]]:
    """Return a function of a factor of s, a rank, a number of bits and the adapters that act.

    It returns the accuracy, and the KL from the base in 16 bits.
    """
    model, factors = load_adapted(train())
    base = ml.load_model("minilora/builtin")
    tokenizer = ml.load_tokenizer("minilora/builtin")
    rows = (ml.load_dataset(ASSETS / "data" / f"{name}.jsonl", tokenizer) for name in ("train", "test", "general"))
    training, test, general = rows
    choices = find_choices(training) or []
    weights = {path: layer.base.weight for path, layer in adapter_layers(model).items()}

    def measure(
        factor: float = 1.0, rank: int = 16, bits: int = 16, acts: Callable[[str], bool] = lambda path: True
    ) -> list[float]:
        for path, layer in adapter_layers(model).items():
            layer.base.weight = nn.Parameter(round_weight(weights[path], bits), requires_grad=False)
            adapter = layer.adapters["default"]
            adapter.scale = factor * factors[path].scale if acts(path) else 0.0
            adapter.lora_A = nn.Parameter(factors[path].lora_A[:rank])
            adapter.lora_B = nn.Parameter(factors[path].lora_B[:, :rank])
        kl = measure_forgetting(model, general, base=base).kl
        return [choice_accuracy(model, test, choices), round(kl, 5)]

    return measure


def main() -> None:
    """Write the curves; `bare` is without the adapter."""
    measure = build_measure()
    curves = {
        "scale": {"at": SCALES, "adapter": [measure(factor=factor) for factor in SCALES]},
        "rank": {"at": RANKS, "adapter": [measure(rank=rank) for rank in RANKS]},
        "bits": {
            "at": BITS,
            "adapter": [measure(bits=bits) for bits in BITS],
            "bare": [measure(bits=bits, factor=0.0) for bits in BITS],
        },
        "where": {
            "at": PARTS,
            "alone": [measure(acts=lambda path, part=part: part in path) for part in PARTS],
            "without": [measure(acts=lambda path, part=part: part not in path) for part in PARTS],
        },
    }
    CURVES.write_text(json.dumps(curves) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
