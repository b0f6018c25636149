"""What a path holds: a safetensors file, or a directory of a model, an adapter, a run, or several of them at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minilora.adapters.layout import CONFIG_FILE
from minilora.errors import FormatError, MiniloraError
from minilora.models.bitsandbytes import packed_weights, read_layout
from minilora.models.checkpoint import read_config
from minilora.models.classifier import load_for
from minilora.models.hub import HUB_ID, fetch
from minilora.models.tokenizer import Tokenizer
from minilora.runs.checkpoints import checkpoints
from minilora.runs.config import default_settings
from minilora.runs.metrics import read_records
from minilora.storage import BUILTIN, TensorEntry, TensorFile, read_json, tensor_files
from minilora.tools.inspect_adapter import adapter_facts, problems_of


def inspect_path(name_or_path: str, model: str | None = None) -> dict[str, dict[str, Any]]:
    """Describe a path or a hub id as "run", "adapter", "model" or "file"; a finished run is an adapter too.

    `model` is the base to measure an adapter against, instead of the one that it names.

    Raises:
        FormatError: there is nothing of a known kind, or a file is missing or damaged.
    """
    path = _locate(name_or_path)
    if path.is_file():
        file = TensorFile(path)
        size = path.stat().st_size
        return {"file": {"path": str(path), "bytes": size, "metadata": file.metadata, "tensors": file.entries}}
    facts = {}
    if (path / "run.json").is_file():
        facts["run"] = run_facts(path)
    if (path / CONFIG_FILE).is_file():
        facts["adapter"] = adapter_facts(path, _base(path, model))
    if (path / "config.json").is_file():
        facts["model"] = model_facts(path)
    if not facts:
        raise FormatError(f"{path}: holds no config.json (a model), {CONFIG_FILE} (an adapter) or run.json (a run)")
    return facts


def _locate(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.exists():
        return path
    if name_or_path != BUILTIN and not HUB_ID.fullmatch(name_or_path):
        raise FormatError(f"{path}: no such file or directory, nor the name of something on the hub")
    try:
        return fetch(name_or_path, "model")
    except FormatError:
        return fetch(name_or_path, "adapter")


def _base(adapter: Path, model: str | None) -> Path | None:
    """Find the base of an adapter: `model`, else the directory that the adapter names, if it exists."""
    if model is not None:
        return _locate(model)
    named = read_json(adapter / CONFIG_FILE).get("base_model_name_or_path")
    is_here = isinstance(named, str) and (named == BUILTIN or (Path(named) / "config.json").is_file())
    return fetch(str(named), "model") if is_here else None


def model_facts(directory: Path) -> dict[str, Any]:
    """Describe the model in a directory, also one that minilora does not run, from the headers of its files.

    A packed weight is one tensor, of the dtype NF4 or FP4, with its own shape and the bytes of all its parts.
    "problems" is why minilora does not load the model.

    Raises:
        FormatError: a file is missing or damaged.
    """
    config, held = read_json(directory / "config.json"), tensor_files(directory)
    tensors = {name: file.entries[name] for name, file in held.items()}
    for name, parts in packed_weights(held).items():
        try:
            layout, _ = read_layout(held[parts[0]], parts[0])
        except FormatError:  # of another version, or damaged: the parts are listed instead
            continue
        size = sum(tensors.pop(part).bytes for part in parts)
        tensors[name] = TensorEntry(layout.quant_type.upper(), layout.shape, size)
    tokens: dict[str, Any]
    try:
        tokenizer = Tokenizer(directory)
        has_template = "yes" if tokenizer.template is not None else "no"
        tokens = {"tokens": len(tokenizer), **tokenizer.special_tokens, "chat_template": has_template}
    except MiniloraError as error:
        tokens = {"problem": str(error)}
    return {
        "path": str(directory),
        "config": config,
        "files": {path.name: path.stat().st_size for path in {file.path: file for file in held.values()}},
        "tensors": dict(sorted(tensors.items())),
        "tokenizer": tokens,
        # On the device "meta" loading checks the same and reads no weight.
        "problems": problems_of(lambda: load_for(read_config(directory).unit, (), directory, "auto", "meta", None)),
    }


def run_facts(directory: Path) -> dict[str, Any]:
    """Describe a run: run.json as it is, summary.json, and the last step, evaluation and checkpoint.

    "settings" are the values of the configuration that differ from the defaults.

    Raises:
        FormatError: a file is damaged.
    """
    record, defaults = read_json(directory / "run.json"), default_settings()
    settings = record.get("config")
    if isinstance(settings, dict):
        settings = {key: value for key, value in settings.items() if key not in defaults or defaults[key] != value}
    facts = {"path": str(directory), "settings": settings, **record}
    metrics, summary = directory / "metrics.jsonl", directory / "summary.json"
    for line in read_records(metrics) if metrics.is_file() else []:
        facts["evaluation" if "eval_loss" in line else "last_step"] = line
    facts["checkpoint"] = next((path.name for path in reversed(checkpoints(directory / "checkpoints"))), None)
    facts["summary"] = read_json(summary) if summary.is_file() else None
    return facts
