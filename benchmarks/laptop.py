"""`python -m benchmarks.laptop`: the table of docs/laptop.md, the forecast memory of models of 0.1 to 7 billion.

A batch has 4 rows of 256 tokens, with recomputed blocks, in float32 and in bfloat16.
"""

from itertools import product

import torch

import minilora.public as ml
from benchmarks import results
from benchmarks.families import FAMILIES, LLAMA3, TIED, sizes
from benchmarks.work import SMOLLM2
from minilora.models.checkpoint import build_on_meta
from minilora.models.config import parse_config
from minilora.runs.memory import Plan, amount, forecast

MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2,
    "HuggingFaceTB/SmolLM2-360M-Instruct": {**SMOLLM2, **sizes(960, 2560, 32, 15, 5, 49_152)},
    "Qwen/Qwen2.5-0.5B-Instruct": {"model_type": "qwen2", **FAMILIES["qwen2"][1], "num_hidden_layers": 24},
    "Qwen/Qwen3-0.6B": {"model_type": "qwen3", **FAMILIES["qwen3"][1], "num_hidden_layers": 28},
    "meta-llama/Llama-3.2-1B-Instruct": {**SMOLLM2, **sizes(2048, 8192, 16, 32, 8, 128_256), "rope_parameters": LLAMA3},
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": {**SMOLLM2, **sizes(2048, 8192, 24, 32, 32, 49_152)},
    "Qwen/Qwen2.5-3B-Instruct": {"model_type": "qwen2", **sizes(2048, 11_008, 36, 16, 2, 151_936), **TIED},
    "Qwen/Qwen2.5-7B-Instruct": {"model_type": "qwen2", **sizes(3584, 18_944, 28, 28, 4, 152_064)},
}


def row(name: str) -> list[str]:
    """Return a model, the bytes of its weights, and the peak of LoRA and of QLoRA in each dtype."""
    config, training = parse_config(MODELS[name]), ml.TrainConfig(gradient_checkpointing="block")
    cells = [f"`{name}`", amount(2 * sum(p.numel() for p in build_on_meta(config).parameters()))]
    bases = (ml.QuantizeConfig("none"), ml.QuantizeConfig("nf4"))
    for dtype, base in product((torch.float32, torch.bfloat16), bases):
        about = (ml.LoraConfig(), training, base, dtype, torch.device("cpu"))
        cells.append(amount(forecast(Plan(config, *about, [(256, 256)] * 4))["block"].peak))
    return cells


if __name__ == "__main__":
    head = ("model", "on disk", "LoRA", "QLoRA", "LoRA, bfloat16", "QLoRA, bfloat16")
    print(results.table(head, list(map(row, MODELS))))
