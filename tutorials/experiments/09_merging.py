"""Train an adapter on a 4-bit base, merge it into three targets, and measure what each merge loses.

python tutorials/experiments/09_merging.py [--small]     writes 09_merging.json; --small: the built-in model

On the way, after a few steps of training, the adapter is merged in bfloat16 to see how much of the update survives.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.data import collate
from minilora.lora import AdapterLinear, lora_delta
from minilora.tools.merging import merge_directory

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
TARGETS = ("dequantized", "original", "requantized")
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
            logits = model.lm_head(model.model(batch.tokens, batch.lengths)[batch.places])
            found.append((logits.float().log_softmax(-1), batch.labels))
    return found


def loss_of(found: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the mean of -log p over all labels."""
    total = sum(-log_p.gather(1, labels[:, None]).sum().item() for log_p, labels in found)
    return total / sum(len(labels) for _, labels in found)


def divergence(before: Sequence[tuple[Tensor, Tensor]], after: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the mean KL divergence over all labelled tokens."""
    terms = [(p.exp() * (p - q)).sum(-1) for (p, _), (q, _) in zip(before, after, strict=True)]
    return torch.cat(terms).mean().item()


def swallowed(model: nn.Module) -> dict[str, float]:
    """Return what merging in bfloat16 does to ΔW: unchanged weights, error and norm, relative to ‖ΔW‖ and to ‖W‖."""
    same = count = error = effect = scale = 0.0
    for layer in adapter_layers(model).values():
        assert isinstance(layer, AdapterLinear)
        (adapter,) = (layer.adapters[name] for name in layer.active)
        W, delta = layer.base.weight, lora_delta(*adapter.factors(), adapter.scale).detach()
        merged = layer.merged_weight().detach()
        same += (merged == W).sum().item()
        count += W.numel()
        error += (merged.float() - W.float() - delta).square().sum().item()
        effect += delta.square().sum().item()
        scale += W.float().square().sum().item()
    return {"unchanged": same / count, "error": math.sqrt(error / effect), "size": math.sqrt(effect / scale)}


def one_seed(name: str, rows: Sequence[Any], held_out: Sequence[Any], config: ml.TrainConfig) -> dict[str, Any]:
    """Train, merge into each target, and measure loss, KL from the trained model, and error of the weights."""
    early = []

    def look(model: nn.Module, step: int) -> None:
        if step in STEPS and step not in [each["step"] for each in early]:
            early.append({"step": step, **swallowed(model)})

    model = train(name, rows, config, look)
    trained = log_probabilities(model, held_out)
    with ml.disable_adapter(model):
        base = loss_of(log_probabilities(model, held_out))
    result: dict[str, Any] = {"seed": config.seed, "base, 4 bits": base, "trained": loss_of(trained), "early": early}
    with tempfile.TemporaryDirectory() as directory:
        adapter = Path(directory) / "adapter"
        ml.save_adapter(model, adapter)
        for target in TARGETS:
            out = Path(directory) / target
            deviation = merge_directory(name, [adapter], out, target, "nf4", torch.bfloat16)  # type: ignore[arg-type]
            merged = log_probabilities(ml.load_model(out, dtype=torch.bfloat16), held_out)
            found = {"loss": loss_of(merged), "kl": divergence(trained, merged), "error": deviation.overall}
            result[target] = found
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


def measure_small(seeds: Sequence[int] = SEEDS, tell: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Measure the built-in model, in seconds."""
    data = Path(ml.__file__).parent / "assets" / "data"
    config = {"learning_rate": 2e-3, "batch_size": 16, "max_steps": 24}
    return measure("minilora/builtin", (data / "train.jsonl", data / "test.jsonl"), 64, config, seeds, tell)


def main() -> None:
    """Measure SmolLM2 on The Devil's Dictionary, or the built-in model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the built-in model and its data, only printed")
    if parser.parse_args().small:
        measure_small()
        return
    data = HERE.parent / "data" / "devil"
    config = {"learning_rate": 5e-4, "batch_size": 8, "max_steps": 16}
    results = measure("smollm2", (data / "train.jsonl", data / "test.jsonl"), 30, config)
    record = {
        "command": "python tutorials/experiments/09_merging.py",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "seeds": list(SEEDS),
        "results": results,
    }
    (HERE / "09_merging.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
