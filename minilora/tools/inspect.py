"""Describe what is in a path: a safetensors file, or a directory of a model, an adapter, a run, or several of them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora import files
from minilora.adapters.layout import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from minilora.errors import FormatError, MiniloraError
from minilora.models.bitsandbytes import packed_weights, quant_type, read_layout
from minilora.models.checkpoint import build_on_meta, load_model, stored_weights
from minilora.models.config import describe_other_parts, read_config
from minilora.models.hub import GGUF, locate
from minilora.models.tokenizer import load_tokenizer
from minilora.runs.checkpoints import checkpoints
from minilora.runs.reports import read_records
from minilora.runs.settings import Settings
from minilora.tools.merging import dense


def inspect_path(name_or_path: str) -> dict[str, dict[str, Any]]:
    """Describe a path or a hub id as "run", "adapter", "model" or "file"; a finished run is an adapter too.

    "manifest" has the files that changed since they were written, if there is one.
    """
    path = Path(name_or_path) if Path(name_or_path).exists() else locate(name_or_path, "model").path
    if path.suffix == ".gguf":
        raise FormatError(f"{path}: {GGUF}")
    if not path.is_dir():
        file = files.TensorFile(path.resolve())
        size = path.stat().st_size
        return {"file": {"path": str(path), "bytes": size, "metadata": file.metadata, "tensors": file.entries}}
    facts: dict[str, dict[str, Any]] = {}
    if (path / "run.json").exists():
        facts["run"] = run_facts(path)
    if (path / CONFIG_FILE).is_file():
        facts["adapter"] = adapter_facts(path)
    if (path / "config.json").is_file():
        facts["model"] = model_facts(path)
    if not facts:
        how = f"; {GGUF}" if any(path.glob("*.gguf")) else ""
        raise FormatError(f"{path}: has no config.json (a model), {CONFIG_FILE} (an adapter) or run.json (a run){how}")
    written = [folder for folder in (path, *checkpoints(path / "checkpoints")) if (folder / files.MANIFEST).is_file()]
    if written:
        changed = (folder / name for folder in written for name in files.changed_files(folder))
        problems = [f"{file}: changed since minilora wrote it" for file in changed]
        count = sum(len(files.read_manifest(folder)) for folder in written)
        facts["manifest"] = {"path": str(path), "files": count, "problems": problems}
    return facts


def run_facts(directory: Path) -> dict[str, Any]:
    """Describe a run: run.json, summary.json, and the last step, evaluation and checkpoint.

    "settings" are the values of the configuration that differ from the defaults.
    """
    record, defaults = files.read_json(directory / "run.json"), Settings().by_flag
    settings = record.get("config")
    if isinstance(settings, dict):
        settings = {key: value for key, value in settings.items() if key not in defaults or defaults[key] != value}
    facts = {"path": str(directory), "settings": settings, **record}
    metrics, summary = directory / "metrics.jsonl", directory / "summary.json"
    for line in read_records(metrics) if metrics.exists() else []:
        facts["evaluation" if "eval_loss" in line else "last_step"] = line
    facts["checkpoint"] = next((path.name for path in reversed(checkpoints(directory / "checkpoints"))), None)
    facts["summary"] = files.read_json(summary) if summary.exists() else None
    return facts


def model_facts(directory: Path) -> dict[str, Any]:
    """Describe a model from the headers of its files; "problems" is why minilora does not load it.

    If it does, a 4-bit weight is one tensor of dtype NF4 or FP4, with its unpacked shape and the bytes of its parts.
    """
    config, stored = files.read_json(directory / "config.json"), files.tensor_files(directory)
    tensors = {name: file.entries[name] for name, file in stored.items()}
    problems = []
    try:  # on the device "meta", loading checks the same and reads no weight
        load_model(directory, device="meta")
    except MiniloraError as error:
        problems = _reasons(error)
    for name, parts in packed_weights(stored).items() if not problems else ():
        layout, _ = read_layout(stored[parts[0]], parts[0])
        size = sum(tensors.pop(part).bytes for part in parts)
        tensors[name] = files.TensorEntry(quant_type(layout).upper(), layout.shape, size)
    tokenizer: dict[str, Any]
    try:
        loaded = load_tokenizer(directory)
        tokenizer = {"tokens": len(loaded), **loaded.special_tokens, "chat_template": loaded.template is not None}
    except MiniloraError as error:
        tokenizer = {"problem": str(error)}
    return {
        "path": str(directory),
        "config": config,
        "files": {path.name: path.stat().st_size for path in {file.path: file for file in stored.values()}},
        "tokenizer": tokenizer,
        "tensors": dict(sorted(tensors.items())),
        "not read": describe_other_parts(directory),
        "problems": problems,
    }


def adapter_facts(directory: Path) -> dict[str, Any]:
    """Describe an adapter; "problems" is why minilora cannot read it.

    "modules" are those with an A and a B, and how much they change: "norm" is ‖s·B A‖. There are none if the adapter
    cannot be read.
    """
    facts: dict[str, Any] = {"path": str(directory)}
    if (directory / "state.json").is_file():  # of a checkpoint
        facts["step"] = files.read_json(directory / "state.json").get("step")
    facts["config"] = files.read_json(directory / CONFIG_FILE)
    facts["tensors"] = files.TensorFile(directory / WEIGHTS_FILE).entries
    try:
        stored = read_adapter(directory)
        config = stored.config()
    except MiniloraError as error:
        return {**facts, "modules": [], "problems": _reasons(error)}
    modules = []
    for path, held in sorted(stored.tensors.items()):
        if "lora_A" in held:
            rank, scale = len(held["lora_A"]), config.scale(path)
            norm = update_norm(held["lora_A"], held["lora_B"], scale)
            modules.append({"module": path, "rank": rank, "scale": scale, "norm": norm})
    return {**facts, "modules": modules, "problems": []}


def weight_norms(directory: Path, modules: Iterable[str]) -> dict[str, float]:
    """Return ‖W‖ of modules of a model directory, by path; weights are read one at a time."""
    model, names = build_on_meta(read_config(directory)), {f"{path}.weight" for path in modules}
    weights = stored_weights(directory, model, "auto", torch.device("cpu"), None, True, names.__contains__)
    norms = ((name, torch.linalg.matrix_norm(dense(weight).float()).item()) for name, weight in weights)
    return {name.removesuffix(".weight"): norm for name, norm in norms}


def update_norm(lora_A: Tensor, lora_B: Tensor, scale: float) -> float:
    """Return the Frobenius norm of s·B A, in float64.

    B A = Q_B R_B (Q_A R_A)ᵀ has the norm of R_B R_Aᵀ, since Q_A and Q_B have orthonormal columns. The shorter
    tr((BᵀB)(AAᵀ)) loses half of the digits where B and A nearly cancel.

    Shapes: lora_A (r, in), lora_B (out, r) -> a number
    """
    right_A, right_B = (torch.linalg.qr(factor.double(), mode="r").R for factor in (lora_A.T, lora_B))
    return abs(scale) * torch.linalg.matrix_norm(right_B @ right_A.T).item()


def _reasons(error: MiniloraError) -> list[str]:
    first, *details = (line.strip() for line in str(error).splitlines())
    return details or [first]
