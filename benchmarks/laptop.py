"""`python -m benchmarks.laptop`: the table of docs/laptop.md, what `finetune` takes with models of 0.1 to 3 billion.

A model has the shape of a published one and random weights; 4 steps of 4 rows of 256 tokens in bfloat16, blocks
recomputed. The minutes are of 500 rows of 100 tokens, three times.
"""

import json
import tempfile
from pathlib import Path

from benchmarks import results, size
from benchmarks.families import FAMILIES, LLAMA3, TIED, sizes
from benchmarks.scale import step_seconds
from benchmarks.work import SMOLLM2
from minilora.runs.memory import amount

ROWS, TOKENS = 4, 256
OF_A_RUN = 500 * 100 * 3  # tokens
MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2,
    "HuggingFaceTB/SmolLM2-360M-Instruct": {**SMOLLM2, **sizes(960, 2560, 32, 15, 5, 49_152)},
    "Qwen/Qwen2.5-0.5B-Instruct": {"model_type": "qwen2", **FAMILIES["qwen2"][1], "num_hidden_layers": 24},
    "Qwen/Qwen3-0.6B": {"model_type": "qwen3", **FAMILIES["qwen3"][1], "num_hidden_layers": 28},
    "meta-llama/Llama-3.2-1B-Instruct": {**SMOLLM2, **sizes(2048, 8192, 16, 32, 8, 128_256), "rope_parameters": LLAMA3},
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": {**SMOLLM2, **sizes(2048, 8192, 24, 32, 32, 49_152)},
    "Qwen/Qwen2.5-3B-Instruct": {"model_type": "qwen2", **sizes(2048, 11_008, 36, 16, 2, 151_936), **TIED},
}


def row(name: str, folder: Path) -> list[str]:
    """Return a model, its size on disk, the peak of LoRA and of QLoRA, and the minutes of a run of each."""
    size.make({**MODELS[name], "dtype": "bfloat16"}, folder / "model")
    disk = sum(path.stat().st_size for path in (folder / "model").iterdir())
    data = folder / "rows.jsonl"
    data.write_text(f"{json.dumps({'prompt': 'word', 'completion': ' word' * 8 * TOKENS})}\n" * ROWS)
    cells = [f"`{name}`", amount(disk)]
    for quantize in ("none", "nf4"):
        words = f"finetune --model {folder / 'model'} --data {data} --out {folder / quantize} --quantize {quantize}"
        words += f" --device cpu --dtype bfloat16 --gradient-checkpointing block --epochs 4 --batch-size {ROWS}"
        words += f" --max-length {TOKENS} --train-on all --eval-split 0 --general-data none --save-steps 0"
        size.measure(["-m", "minilora", *words.split()])
        summary = json.loads((folder / quantize / "summary.json").read_text(encoding="utf-8"))
        minutes = step_seconds(folder / quantize) * OF_A_RUN / (ROWS * TOKENS) / 60
        cells += [amount(summary["peak_memory_bytes"]), f"{minutes:.0f} min"]
    return cells


if __name__ == "__main__":
    rows = []
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(name, Path(folder)))
            print(" | ".join(rows[-1]), flush=True)
    print(results.table(("model", "on disk", "LoRA: memory", "time", "QLoRA: memory", "time"), rows))
