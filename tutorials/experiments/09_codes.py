"""Quantize a model's linears with several 4-bit codes, and measure how far its predictions move.

python tutorials/experiments/09_codes.py                writes 09_codes.json
python tutorials/experiments/09_codes.py --small        the built-in model, only printed
python tutorials/experiments/09_codes.py --model DIR    adds the model of scripts/pretrain.py --large to the file
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minilora as ml
from minilora.data import IGNORE_INDEX
from minilora.models.bitsandbytes import FP4_LEVELS
from minilora.nf4 import LEVELS

HERE = Path(__file__).resolve().parent
CODES = {
    "NF4": torch.tensor(LEVELS),
    "FP4, E2M1": torch.tensor([s * level / 6 for level in (0.0, 0.5, 1, 1.5, 2, 3, 4, 6) for s in (1, -1)]).unique(),
    "FP4, bitsandbytes": torch.tensor(FP4_LEVELS).unique(),
    "Int4": torch.arange(-7, 8) / 7,
}


def fitted(block_size: int, squared: bool) -> Tensor:
    """Fit 16 levels to normal numbers in blocks of this size, by Lloyd's algorithm; -1, 0 and 1 stay.

    Each level becomes the mean (for the least squared error) or the median (for the least absolute error) of the
    numbers that are nearest to it.
    """
    blocks = torch.randn(2**22 // block_size, block_size, generator=torch.Generator().manual_seed(0))
    x = (blocks / blocks.abs().amax(1, keepdim=True)).flatten().double().sort().values
    levels, sums = CODES["NF4"].double(), F.pad(x.cumsum(0), (1, 0))
    for _ in range(200):
        inner = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        begin, end = F.pad(inner, (1, 0)), F.pad(inner, (0, 1), value=len(x))
        levels = (sums[end] - sums[begin]) / (end - begin) if squared else x[(begin + end) // 2]
        levels[[0, 7, 15]] = torch.tensor([-1.0, 0, 1], dtype=torch.float64)
    return levels.float()


def round_to(weight: Tensor, levels: Tensor, block_size: int) -> Tensor:
    """Replace each number of a weight by the nearest of its block's levels."""
    n = weight.numel()
    blocks = F.pad(weight.flatten(), (0, -n % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1, keepdim=True).clamp(min=1e-38)
    codes = torch.bucketize(blocks / absmax, (levels[1:] + levels[:-1]) / 2)
    return (levels[codes] * absmax).flatten()[:n].view_as(weight)


def log_probabilities(model: nn.Module, rows: list[Any]) -> list[Tensor]:
    """Return what the model predicts at each labelled token of each row: (labels, V)."""
    found = []
    with torch.no_grad():
        for row in rows:
            at = [i - 1 for i, label in enumerate(row.labels) if label != IGNORE_INDEX and i > 0]
            found.append(model(torch.tensor([row.tokens]))[0, at].log_softmax(-1))
    return found


def divergence(model: nn.Module, rows: list[Any], before: list[Tensor]) -> Tensor:
    """Return for each row the mean KL divergence of a token from the model before rounding."""
    after = log_probabilities(model, rows)
    return torch.stack([(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(before, after, strict=True)]).double()


def interval(values: Tensor) -> float:
    """Return half of the 95 % interval of the mean."""
    return 1.96 * values.std().item() / len(values) ** 0.5


def measure(name: str, data: Path, count: int, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return errors of the weights and the divergence, for each block size and code."""
    model, dataset = ml.load_model(name, dtype=torch.float32), ml.load_dataset(data, ml.load_tokenizer(name))
    rows = [dataset[i] for i in range(count)]
    linears = [module for module in model.model.modules() if isinstance(module, nn.Linear)]
    weights, before = [linear.weight.detach() for linear in linears], log_probabilities(model, rows)
    numbers = sum(weight.numel() for weight in weights)
    results = []
    of_nf4 = torch.zeros(count)
    for block_size in (64, 4096):
        codes = {"fitted, |e|": fitted(block_size, False), "fitted, e²": fitted(block_size, True)}
        for code, levels in (CODES | codes).items():
            absolute = squared = scale = 0.0
            for linear, weight in zip(linears, weights, strict=True):
                linear.weight = nn.Parameter(round_to(weight, levels, block_size), requires_grad=False)
                error = linear.weight - weight
                absolute += error.abs().sum().item()
                squared += error.square().sum().item()
                scale += weight.square().sum().item()
            errors = {"absolute": absolute / (numbers * scale) ** 0.5, "squared": (squared / scale) ** 0.5}
            kl = divergence(model, rows, before)
            of_nf4 = kl if code == "NF4" else of_nf4
            more = kl - of_nf4  # row by row, which is known better than either
            found = {"kl": kl.mean().item(), "kl_interval": interval(kl)}
            found |= {"more": more.mean().item(), "more_interval": interval(more)}
            results.append({"block_size": block_size, "code": code, **errors, **found})
            tell(f"block {block_size:4}, {code:17}: KL {found['kl']:.4f}, {found['more']:+.4f} ± {interval(more):.4f}")
    return results


def measure_small(tell: Callable[[str], None] = print, name: str = "minilora/builtin") -> list[dict[str, Any]]:
    """Measure the built-in model, or another of its kind, on general sentences."""
    return measure(name, Path(ml.__file__).parent / "assets" / "data" / "general.jsonl", 64, tell)


def main() -> None:
    """Measure SmolLM2 on definitions and the built-in model, or a single model."""
    from record import add_to_record, read_arguments, write_record  # beside this script

    arguments = read_arguments(__doc__)
    if arguments.small:
        measure_small()
        return
    if arguments.model:
        add_to_record(__file__, measure_small(name=arguments.model))
        return
    results = measure("smollm2", HERE.parent / "data" / "devil" / "test.jsonl", 50, print)
    seeds = [0]  # of the normal numbers that codes are fitted to; nothing else is random
    write_record(__file__, results, seeds, **{"built-in model": measure_small()})


if __name__ == "__main__":
    main()
