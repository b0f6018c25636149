"""Pack the built-in model and an adapter for the explorer, as a script that a page can load from the disk.

    python site/pack.py        # writes site/explore/weights.js; then open site/explore/index.html

The adapter is that of `minilora finetune`, trained once and kept in `.cache/explore`. A and B are packed as the
singular value decomposition of B A, which stays the same: the first k rows of A and columns of B are its best
cut to rank k.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.adapters.initialize import factors_from_weight
from minilora.adapters.weighted import Factors
from minilora.files import ASSETS, replacing
from minilora.lora import lora_delta
from minilora.runs.evaluate import find_choices

ROOT = Path(__file__).parents[1]
OUT = ROOT / "site" / "explore" / "weights.js"
CURVES = ROOT / "site" / "curves.json"  # by `measure.py`
EXAMPLES = 3  # of each category
LENGTHS = range(25, 65)  # characters of an example


def train() -> Path:
    """Return the directory of the adapter of `minilora finetune`, trained unless it lies in the cache."""
    digest = hashlib.sha256()
    for path in sorted(ASSETS.rglob("*")):
        if path.is_file():
            digest.update(path.read_bytes())
    run = ROOT / ".cache" / "explore" / digest.hexdigest()[:16]
    run.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{run.parent}.lock"):
        if not (run / "summary.json").is_file():
            shutil.rmtree(run, ignore_errors=True)  # of a build that was stopped, perhaps by other code
            subprocess.run([sys.executable, "-m", "minilora", "finetune", "--out", str(run)], check=True)
    return run


def load_adapted(run: Path) -> tuple[Any, dict[str, Factors]]:
    """Load the model with the adapter of a run, and decompose each B A: its factors, the largest direction first."""
    model = ml.load_model("minilora/builtin")
    ml.load_adapter(model, run)
    factors = {}
    for path, layer in adapter_layers(model).items():
        adapter = layer.adapters["default"]
        delta = lora_delta(adapter.lora_A, adapter.lora_B, 1.0).detach()
        factors[path] = Factors(*factors_from_weight("pissa", delta, len(adapter.lora_A), 1.0), adapter.scale)
    return model, factors


def book() -> dict[str, Any]:
    """Return the curve over s of chapter 10: the mean of its seeds."""
    path = ROOT / "tutorials" / "experiments" / "10_forgetting.json"
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    runs = [result["scaled"] for result in results if result["run"] == "LoRA r 16, 2e-3"]
    means = [[statistics.mean(run[scale][i] for run in runs) for i in (0, 1)] for scale in runs[0]]
    return {"at": [float(scale) for scale in runs[0]], "adapter": means}


def examples() -> list[dict[str, str]]:
    """Return a few short held-out definitions of each category."""
    found: dict[str, list[str]] = {}
    for line in (ASSETS / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        definition = row["prompt"].removeprefix("Definition: ").removesuffix("\nCategory:")
        if len(definition) in LENGTHS:
            found.setdefault(row["completion"].strip(), []).append(definition)
    return [{"category": name, "definition": each} for name in sorted(found) for each in found[name][:EXAMPLES]]


def pack_tokenizer() -> dict[str, list[Any]]:
    """Return the tokens in the order of their ids, and the merges in theirs."""
    model = json.loads((ASSETS / "model" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    return {"vocab": sorted(model["vocab"], key=model["vocab"].get), "merges": model["merges"]}


def pack(tensor: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Return shape, dtype and bytes of a tensor."""
    data = tensor.detach().to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
    return {
        "shape": list(tensor.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "data": base64.b64encode(data).decode(),
    }


def main() -> None:
    """Write the script."""
    run = train()
    _, factors = load_adapted(run)
    base = ml.load_model("minilora/builtin")
    tokenizer = ml.load_tokenizer("minilora/builtin")
    choices = find_choices(ml.load_dataset(ASSETS / "data" / "train.jsonl", tokenizer)) or []
    content = {
        "config": base.config.source,
        "tokenizer": pack_tokenizer(),
        "categories": [tokenizer.decode(list(choice)) for choice in choices],
        "examples": examples(),
        "curves": {**json.loads(CURVES.read_text(encoding="utf-8")), "book": book()},
        "base": {name: pack(each, torch.bfloat16) for name, each in base.model.state_dict(prefix="model.").items()},
        "adapter": {
            path: {
                "scale": each.scale,
                "lora_A": pack(each.lora_A, torch.float32),
                "lora_B": pack(each.lora_B, torch.float32),
            }
            for path, each in factors.items()
        },
    }
    with replacing(OUT) as partial:
        partial.write_text(f"const PACKED = {json.dumps(content)};\n", encoding="utf-8")
    print(f"{OUT.relative_to(ROOT)}: {OUT.stat().st_size / 1e6:.2f} MB, with the adapter of {run}")


if __name__ == "__main__":
    main()
