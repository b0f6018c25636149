"""Train adapters of several ranks at several learning rates, and find the one with the lowest held-out loss.

    python recipes/sweep.py OUT TRAIN.jsonl HELD_OUT.jsonl [MODEL]

Each run has a directory of its own with records, checkpoints and the adapter. A sweep that was stopped resumes, and one
with more ranks or rates trains only the new ones. `table` and `heat_map` show the losses; that of a diverging run is
infinite. If the best run is at the edge of the ranks or rates, a wider sweep may find a better one.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import minilora as ml

Losses = Mapping[tuple[int, float], float]  # (rank, rate) -> held-out loss


def sweep(
    model: Any,
    rows: Sequence[ml.Example],
    held_out: Sequence[ml.Example],
    out: str | Path,
    ranks: Sequence[int],
    rates: Sequence[float],
    lora: ml.LoraConfig | None = None,
    config: ml.TrainConfig | None = None,
) -> dict[tuple[int, float], float]:
    """Train an adapter of each rank at each rate, from the same seed; other settings are those of the configs."""
    config = config or ml.TrainConfig()
    losses = {}
    for r, rate in product(ranks, rates):
        folder = Path(out) / f"r{r}-{rate:g}"
        ml.attach(model, replace(lora or ml.LoraConfig(), r=r), seed=config.seed)
        settings = replace(config, learning_rate=rate)
        try:
            ml.train(model, rows, settings, ml.Tracker("jsonl", folder), held_out, folder / "checkpoints")
            ml.save_adapter(model, folder)
            last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
            losses[r, rate] = float("inf") if last["eval_loss"] is None else last["eval_loss"]
        except ml.TrainingError as error:
            if "gradient norm" not in str(error):  # which is not finite, as the loss may be
                raise
            losses[r, rate] = float("inf")
        finally:
            ml.detach(model)
        print(f"r {r}, rate {rate:g}: {losses[r, rate]:.4f}", file=sys.stderr)
    return losses


def best(losses: Losses) -> tuple[int, float]:
    """Return the rank and the rate with the lowest loss."""
    return min(losses, key=lambda pair: losses[pair])


def grid(losses: Losses) -> tuple[list[int], list[float], list[list[float]]]:
    """Return the ranks, the rates, and the losses with a row for each rank and a column for each rate."""
    ranks = sorted({r for r, _ in losses})
    rates = sorted({rate for _, rate in losses})
    return ranks, rates, [[losses[r, rate] for rate in rates] for r in ranks]


def table(losses: Losses) -> str:
    """Return the losses as a Markdown table, the lowest in bold."""
    ranks, rates, values = grid(losses)
    lowest = losses[best(losses)]
    lines = [["r", *(f"{rate:g}" for rate in rates)], ["---"] * (1 + len(rates))]
    for r, row in zip(ranks, values, strict=True):
        lines.append([str(r), *(f"**{loss:.4f}**" if loss == lowest else f"{loss:.4f}" for loss in row)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def heat_map(losses: Losses) -> Any:
    """Draw the losses by rank and rate with matplotlib; return the figure."""
    from matplotlib.figure import Figure

    ranks, rates, values = grid(losses)
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(values, origin="lower", cmap="viridis_r", aspect="auto"), label="held-out loss")
    for i, j in product(range(len(ranks)), range(len(rates))):
        axes.text(j, i, f"{values[i][j]:.3f}", ha="center", va="center")
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_yticks(range(len(ranks)), ranks)
    axes.set(xlabel="learning rate", ylabel="rank")
    return figure


if __name__ == "__main__":
    out, train, valid, *rest = sys.argv[1:]
    name = rest[0] if rest else "minilora/builtin"
    tokenizer = ml.load_tokenizer(name)
    data = [ml.load_dataset(path, tokenizer) for path in (train, valid)]
    losses = sweep(ml.load_model(name), *data, out, ranks=(4, 16, 64), rates=(1e-4, 3e-4, 1e-3))
    print(table(losses))
    heat_map(losses).savefig(Path(out) / "losses.svg")
