"""Train an adapter on a 4-bit base, merge it into three targets, and measure what each merge loses.

python tutorials/experiments/11_merging.py                writes 11_merging.json
python tutorials/experiments/11_merging.py --small        the built-in model on 64 rows, only printed
python tutorials/experiments/11_merging.py --model DIR    adds the model of scripts/pretrain.py --large to the file

On the way, after a few steps of training, the adapter is merged in bfloat16 to see how much of the update survives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import minilora as ml
from minilora.adapter import adapter_layers, replace_modules
from minilora.data import collate
from minilora.llama import Documents
from minilora.lora import dense_linear, lora_delta, merge_weight
from minilora.nf4 import dequantize_weight, quantize_weight

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
TARGETS = ("dequantized", "original", "requantized")  # the first is what the others are compared with
RATES = (2e-3, 2e-4)  # for models of clean weights: the second leaves ΔW small beside the error of rounding
STEPS = (1, 2, 4, 8, 16)  # after which an early merge is looked at


def train(name: str, rows: Sequence[Any], config: ml.TrainConfig, on_step: Callable[[nn.Module, int], None]) -> Any:
    """Train an adapter of rank 16 on the model in four bits, computing in bfloat16."""
    model = ml.load_model(name, dtype=torch.bfloat16, quantize="nf4")
    ml.attach(model, ml.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), seed=config.seed)
    ml.train(model, rows, config, on_step=lambda record: on_step(model, record.get("step", 0)))
    return model


def log_probabilities(model: Any, rows: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
    """Return what the model predicts at the labelled tokens of some rows at a time, (labels, V), and the labels."""
    found = []
    with torch.no_grad():
        for begin in range(0, len(rows), 16):
            batch = collate(rows[begin : begin + 16], torch.device("cpu"))
            logits = model.lm_head(model.model(batch.tokens, Documents(batch.lengths))[batch.label_positions])
            found.append((logits.float().log_softmax(-1), batch.labels))
    return found


def loss_of(found: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the mean of -log p over all labels."""
    total = sum(-log_p.gather(1, labels[:, None]).sum().item() for log_p, labels in found)
    return total / sum(len(labels) for _, labels in found)


def difference(one: Sequence[tuple[Tensor, Tensor]], other: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return how much more loss one has than the other, and half of the 95 % interval over batches."""
    more = torch.tensor([loss_of([a]) - loss_of([b]) for a, b in zip(one, other, strict=True)], dtype=torch.float64)
    return {"more": more.mean().item(), "more_interval": 1.96 * more.std().item() / len(more) ** 0.5}


def divergence(before: Sequence[tuple[Tensor, Tensor]], after: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the mean KL divergence over all labelled tokens."""
    terms = [(p.exp() * (p - q)).sum(-1) for (p, _), (q, _) in zip(before, after, strict=True)]
    return torch.cat(terms).mean().item()


def compare(layers: dict[str, Any], merged: dict[str, Tensor]) -> dict[str, float]:
    """Compare merged weights W' with W, the base's, and with W + ΔW.

    unchanged: the share of weights with W' = W;  error: ‖W' - (W + ΔW)‖ / ‖ΔW‖;  size: ‖ΔW‖ / ‖W‖, over all layers.
    """
    same = count = error = effect = scale = 0.0
    for path, layer in layers.items():
        (adapter,) = (layer.adapters[name] for name in layer.active)
        W, delta = layer.base.weight, lora_delta(adapter.lora_A, adapter.lora_B, adapter.scale).detach()
        same += (merged[path] == W).sum().item()
        count += W.numel()
        error += (merged[path].float() - W.float() - delta).square().sum().item()
        effect += delta.square().sum().item()
        scale += W.float().square().sum().item()
    return {"unchanged": same / count, "error": math.sqrt(error / effect), "size": math.sqrt(effect / scale)}


def merge(layers: dict[str, Any], target: str, originals: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a merge in bfloat16, by path; requantized ones dequantized, as they are used."""
    with torch.no_grad():
        if target == "original":
            return {path: merge_weight(originals[path], layer.active_adapters()) for path, layer in layers.items()}
        merged = {path: layer.merged_weight() for path, layer in layers.items()}
        if target == "requantized":
            packed = {path: quantize_weight(W) for path, W in merged.items()}
            return {
                path: dequantize_weight(packed[path], layers[path].base.layout, W.dtype) for path, W in merged.items()
            }
        return merged


def one_seed(name: str, rows: Sequence[Any], held_out: Sequence[Any], config: ml.TrainConfig) -> dict[str, Any]:
    """Train, merge into each target, and measure loss, KL from the trained model, and error of the weights."""
    early, originals = [], ml.load_model(name, dtype=torch.bfloat16).state_dict()
    originals = {key.removesuffix(".weight"): tensor for key, tensor in originals.items()}

    def look(model: nn.Module, step: int) -> None:
        if step in STEPS and step not in [each["step"] for each in early]:
            layers = adapter_layers(model)
            early.append({"step": step, **compare(layers, merge(layers, "dequantized", originals))})

    model = train(name, rows, config, look)
    trained, layers = log_probabilities(model, held_out), adapter_layers(model)
    with ml.disable_adapter(model):
        base = loss_of(log_probabilities(model, held_out))
    result: dict[str, Any] = {"seed": config.seed, "base, 4 bits": base, "trained": loss_of(trained), "early": early}
    predicted = {}
    for target in TARGETS:
        weights = merge(layers, target, originals)
        pairs = [(layer, dense_linear(weights[path], None)) for path, layer in layers.items()]
        replace_modules(model, pairs)
        merged = predicted[target] = log_probabilities(model, held_out)
        replace_modules(model, ((plain, layer) for layer, plain in pairs))
        found = {"loss": loss_of(merged), "kl": divergence(trained, merged), **compare(layers, weights)}
        result[target] = found | difference(merged, predicted["dequantized"])
    return result


def measure(
    name: str,
    files: tuple[Path, Path],
    count: int,
    config: dict[str, Any],
    seeds: Sequence[int] = SEEDS,
    tell: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Measure all seeds, and tell what was found for each."""
    tokenizer = ml.load_tokenizer(name)
    rows, held_out = (ml.load_dataset(path, tokenizer) for path in files)
    chosen = [held_out[i] for i in range(count)]
    dense = loss_of(log_probabilities(ml.load_model(name, dtype=torch.bfloat16), chosen))
    results = []
    for seed in seeds:
        found = one_seed(name, rows, chosen, ml.TrainConfig(seed=seed, **config))
        results.append({"base, 16 bits": dense, **found})
        tell(json.dumps(results[-1]))
    return results


def measure_small(
    seeds: Sequence[int] = SEEDS,
    tell: Callable[[str], None] = print,
    name: str = "minilora/builtin",
    rate: float = RATES[0],
    count: int = 64,
) -> list[dict[str, Any]]:
    """Measure the built-in model, or another of its kind, on so many rows of its task."""
    data = Path(ml.__file__).parent / "assets" / "data"
    config = {"learning_rate": rate, "batch_size": 16, "max_steps": 24}
    return measure(name, (data / "train.jsonl", data / "test.jsonl"), count, config, seeds, tell)


def measure_clean(name: str) -> dict[str, list[dict[str, Any]]]:
    """Measure a model of clean weights on all held-out rows of the task, at each rate."""
    return {f"{rate:g}": measure_small(name=name, rate=rate, count=800) for rate in RATES}


def main() -> None:
    """Measure SmolLM2 on The Devil's Dictionary and the built-in model, or a single model."""
    from record import add_to_record, read_arguments, write_record  # beside this script

    arguments = read_arguments(__doc__)
    if arguments.small:
        measure_small()
        return
    if arguments.model:
        add_to_record(__file__, measure_clean(arguments.model))
        return
    data = HERE.parent / "data" / "devil"
    config = {"learning_rate": 5e-4, "batch_size": 8, "max_steps": 16}
    results = measure("smollm2", (data / "train.jsonl", data / "test.jsonl"), 30, config)
    write_record(__file__, results, SEEDS, **{"built-in model": measure_clean("minilora/builtin")})


if __name__ == "__main__":
    main()
