"""What a path holds: a safetensors file, or a directory of a model, an adapter, a run, or several of them at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.adapters.layout import CONFIG_FILE
from minilora.errors import FormatError
from minilora.models.hub import HUB_ID, fetch
from minilora.storage import BUILTIN, TensorEntry, TensorFile, read_json
from minilora.tools.inspect_adapter import AdapterFacts, adapter_facts
from minilora.tools.inspect_model import ModelFacts, model_facts
from minilora.tools.inspect_run import run_facts


@dataclass(frozen=True)
class FileFacts:
    """A safetensors file: its header."""

    path: str
    bytes: int
    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]


@dataclass(frozen=True)
class Facts:
    """What was found; a finished run is an adapter too."""

    run: dict[str, Any] | None = None
    adapter: AdapterFacts | None = None
    model: ModelFacts | None = None
    file: FileFacts | None = None


def look(name_or_path: str, model: str | None = None) -> Facts:
    """What a path holds. `model` is the base to measure an adapter against, if not the one that its config names.

    Raises:
        FormatError: there is nothing there that can be looked into, or a file is missing or damaged.
    """
    path = _locate(name_or_path)
    if path.is_file():
        file = TensorFile(path)
        return Facts(file=FileFacts(str(path), path.stat().st_size, file.metadata, file.entries))
    has = {name for name in ("run.json", CONFIG_FILE, "config.json") if (path / name).is_file()}
    if not has:
        raise FormatError(f"{path}: holds no config.json (a model), {CONFIG_FILE} (an adapter) or run.json (a run)")
    return Facts(
        run=run_facts(path) if "run.json" in has else None,
        adapter=adapter_facts(path, _base(path, model)) if CONFIG_FILE in has else None,
        model=model_facts(path) if "config.json" in has else None,
    )


def _locate(name_or_path: str) -> Path:
    """Where the thing with a name is.

    Raises:
        FormatError: nowhere.
    """
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
    """The directory of an adapter's base: `model`, else what the adapter names, where that is here."""
    if model is not None:
        return _locate(model)
    named = read_json(adapter / CONFIG_FILE).get("base_model_name_or_path")
    if not isinstance(named, str) or not (named == BUILTIN or (Path(named) / "config.json").is_file()):
        return None
    return fetch(named, "model")
