"""Describe what a path holds: a safetensors file, or a directory of a model, an adapter, a run, or several of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.adapters.combine import NOT_ADDED
from minilora.adapters.files import load_adapter
from minilora.adapters.layout import (
    ADAPTER_DTYPES,
    CONFIG_FILE,
    FIELD_OF_TENSOR,
    PLAIN_INITS,
    WEIGHTS_FILE,
    Stored,
    base_model_of,
    parse_tensor_name,
    read_adapter,
    unknown_fields,
    vocabulary_of,
)
from minilora.errors import FormatError, MiniloraError
from minilora.files import (
    BUILTIN,
    MANIFEST,
    TensorEntry,
    TensorFile,
    finish_commit,
    read_json,
    read_manifest,
    tensor_files,
    verify,
)
from minilora.lora import dora_norm, lora_delta
from minilora.models.bitsandbytes import packed_weights, read_layout, read_packed
from minilora.models.checkpoint import EMBEDDING, HEAD, load_model
from minilora.models.hub import HUB_ID, fetch
from minilora.models.tokenizer import Tokenizer
from minilora.models.vocabulary import resize_token_embeddings
from minilora.nf4 import dequantize_weight
from minilora.runs.checkpoints import checkpoints
from minilora.runs.config import Settings
from minilora.runs.reports import read_records

FOLDED = {  # what `minilora export` folds into B
    "use_rslora": "the scale is lora_alpha / √r",
    "rank_pattern": "modules have ranks of their own",
    "alpha_pattern": "modules have a lora_alpha of their own",
}
KEPT = {"embeddings": "A and B of an embedding"}
NOT_PLAIN = {field: why for field, why in NOT_ADDED.items() if field != "task_type"}
NOT_PLAIN["convolutions"] = "A and B of a convolution"


def inspect_path(name_or_path: str, model: str | None = None) -> dict[str, dict[str, Any]]:
    """Describe a path or a hub id as "run", "adapter", "model" or "file"; a finished run is an adapter too.

    "manifest" says whether the files are as they were written, if there is one. `model` is the base of an adapter,
    instead of the one that the adapter names.

    Raises:
        FormatError: there is nothing of a known kind, or a file is missing or damaged.
    """
    path = _locate(name_or_path)
    if not path.is_dir():
        if path.suffix != ".safetensors":
            raise FormatError(f"{path}: is no .safetensors file; need one, or the directory of a model, adapter or run")
        file = TensorFile(path.resolve())
        size = path.stat().st_size
        return {"file": {"path": str(path), "bytes": size, "metadata": file.metadata, "tensors": file.entries}}
    finish_commit(path)
    facts = {}
    if (path / "run.json").exists():
        facts["run"] = run_facts(path)
    if (path / CONFIG_FILE).is_file():
        facts["adapter"] = adapter_facts(path, _base_of(path, model))
    if (path / "config.json").is_file():
        facts["model"] = model_facts(path)
    if not facts:
        raise FormatError(f"{path}: holds no config.json (a model), {CONFIG_FILE} (an adapter) or run.json (a run)")
    written = [each for each in (path, *checkpoints(path / "checkpoints")) if (each / MANIFEST).is_file()]
    return {**facts, "manifest": manifest_facts(path, written)} if written else facts


def manifest_facts(directory: Path, written: Sequence[Path]) -> dict[str, Any]:
    """Count the files in the manifests of directories, of a run and its checkpoints; "problems" are what differs."""
    count, problems = 0, []
    for each in written:
        try:
            verify(each)
            count += len(read_manifest(each))
        except FormatError as error:
            problems.append(str(error))
    return {"path": str(directory), "files": count, "problems": problems}


def run_facts(directory: Path) -> dict[str, Any]:
    """Describe a run: run.json as it is, summary.json, and the last step, evaluation and checkpoint.

    "settings" are the values of the configuration that differ from the defaults.

    Raises:
        FormatError: a file is damaged.
    """
    record, defaults = read_json(directory / "run.json"), Settings().by_flag
    settings = record.get("config")
    if isinstance(settings, dict):
        settings = {key: value for key, value in settings.items() if key not in defaults or defaults[key] != value}
    facts = {"path": str(directory), "settings": settings, **record}
    metrics, summary = directory / "metrics.jsonl", directory / "summary.json"
    for line in read_records(metrics) if metrics.exists() else []:
        facts["evaluation" if "eval_loss" in line else "last_step"] = line
    facts["checkpoint"] = next((path.name for path in reversed(checkpoints(directory / "checkpoints"))), None)
    facts["summary"] = read_json(summary) if summary.exists() else None
    return facts


def model_facts(directory: Path) -> dict[str, Any]:
    """Describe a model from the headers of its files; "problems" is why minilora does not load it.

    A 4-bit weight is one tensor of the dtype NF4 or FP4, with its unpacked shape and the bytes of all its parts.

    Raises:
        FormatError: a file is missing or damaged.
    """
    config, files = read_json(directory / "config.json"), tensor_files(directory)
    tensors = {name: file.entries[name] for name, file in files.items()}
    for name, parts in packed_weights(files).items():
        try:
            layout, _ = read_layout(files[parts[0]], parts[0])
        except FormatError:  # of another version, or damaged: the parts are listed instead
            continue
        size = sum(tensors.pop(part).bytes for part in parts)
        tensors[name] = TensorEntry(layout.quant_type.upper(), layout.shape, size)
    tokenizer: dict[str, Any]
    try:
        found = Tokenizer(directory)
        tokenizer = {"tokens": len(found), **found.special_tokens, "chat_template": found.template is not None}
    except MiniloraError as error:
        tokenizer = {"problem": str(error)}
    problems = []
    try:  # on the device "meta", loading checks the same and reads no weight
        load_model(directory, device="meta")
    except MiniloraError as error:
        problems = _problems(error)
    return {
        "path": str(directory),
        "config": config,
        "files": {path.name: path.stat().st_size for path in {file.path: file for file in files.values()}},
        "tokenizer": tokenizer,
        "tensors": dict(sorted(tensors.items())),
        "problems": problems,
    }


def adapter_facts(directory: Path, base: Path | None = None) -> dict[str, Any]:
    """Describe an adapter, alone or on the model in the directory `base`; "problems" is why minilora does not load it.

    "features" is what other readers may ignore or refuse (see `features`). "modules" are those with an A and a B,
    and how much they change; there are none if the adapter cannot be read.

    Raises:
        FormatError: a file is missing or damaged.
    """
    values, file, state = read_json(directory / CONFIG_FILE), TensorFile(directory / WEIGHTS_FILE), {}
    if (directory / "state.json").is_file():
        state = {"step": read_json(directory / "state.json").get("step")}  # of a checkpoint
    modules, problems = [], []
    try:
        modules = _module_facts(read_adapter(directory), tensor_files(base) if base else {})
        if base is not None:
            _try_loading(directory, base)
    except MiniloraError as error:
        problems = _problems(error)
    return {
        "path": str(directory),
        **state,
        "base": None if base is None else str(base),
        "config": values,
        "tensors": file.entries,
        "modules": modules,
        "features": features(values, file.shapes),
        "problems": problems,
    }


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


def _base_of(adapter: Path, model: str | None) -> Path | None:
    """Find the base of an adapter: `model`, else the directory that the adapter names, if it exists."""
    if model is not None:
        return _locate(model)
    named = base_model_of(adapter)
    is_here = named is not None and (named == BUILTIN or (Path(named) / "config.json").is_file())
    return fetch(str(named), "model") if is_here else None


def _problems(error: MiniloraError) -> list[str]:
    first, *details = (line.strip() for line in str(error).splitlines())
    return details or [first]


def _try_loading(directory: Path, base: Path) -> None:
    """Load an adapter onto its base, without the weights of the base unless the adapter has copies to compare."""
    has_copies = any(parse_tensor_name(name)[1] == "weight" for name in TensorFile(directory / WEIGHTS_FILE).shapes)
    model = load_model(base, device="cpu" if has_copies else "meta")
    resize_token_embeddings(model, vocabulary_of(directory))
    load_adapter(model, directory)


def _module_facts(stored: Stored, base: Mapping[str, TensorFile]) -> list[dict[str, Any]]:
    """Describe each module with an A and a B; norms are None where they need a base that is not there.

    Raises:
        FormatError: the config or a 4-bit weight of the base is malformed.
    """
    config, packed, facts = stored.config(), packed_weights(base), []
    for module, held in sorted(stored.tensors.items()):
        if "lora_A" not in held:
            continue
        A, B, weight = held["lora_A"].flatten(1), held["lora_B"].flatten(1), _base_weight(base, packed, module)
        scale = config.scale(module)
        if weight is not None and stored.values.get("fan_in_fan_out"):
            weight = weight.T
        delta, size = delta_norm(A, B, scale, held.get("magnitude"), weight), None if weight is None else norm(weight)
        facts.append(
            {
                "module": module,
                "rank": len(A),
                "scale": scale,
                "delta_norm": delta,
                "base_norm": size,
                "relative_norm": delta / size if delta is not None and size else None,
            }
        )
    return facts


def _base_weight(base: Mapping[str, TensorFile], packed: Mapping[str, list[str]], module: str) -> Tensor | None:
    """Read the weight of a module of the base as a matrix; None if there is none, or its dtype has no norm."""
    name = f"{module}.weight"
    if name == HEAD and HEAD not in base:  # tied
        name = EMBEDDING
    if name in packed:
        return dequantize_weight(*read_packed(base, packed[name], torch.device("cpu")), torch.float32)
    tensor = base[name].read(name) if name in base else None
    return None if tensor is None or tensor.dtype not in ADAPTER_DTYPES or tensor.dim() < 2 else tensor.flatten(1)


def delta_norm(A: Tensor, B: Tensor, scale: float, magnitude: Tensor | None, weight: Tensor | None) -> float | None:
    """Return ‖ΔW‖, ΔW = s·B A; with DoRA, whose ΔW is m ⊙ (W + s·B A)/‖W + s·B A‖ - W, None without W.

    B A = Q_B R_B (Q_A R_A)ᵀ has the norm of R_B R_Aᵀ, since Q_A and Q_B have orthonormal columns. The shorter
    tr((BᵀB)(AAᵀ)) loses half of the digits where B and A nearly cancel.

    Shapes: A (r, in), B (out, r), magnitude (out), weight (out, in) -> a number
    """
    if len(A) != B.size(1):  # a convolution in groups
        return None
    if magnitude is None:
        R_A, R_B = (torch.linalg.qr(factor.double(), mode="r").R for factor in (A.T, B))
        return abs(scale) * norm(R_B @ R_A.T)
    if weight is None or weight.shape != (len(B), A.size(1)) or magnitude.numel() != len(B):
        return None
    W, A, B, m = (tensor.float() for tensor in (weight, A, B, magnitude.flatten()))
    return norm((m / dora_norm(W, A, B, scale))[:, None] * (W + lora_delta(A, B, scale)) - W)


def norm(matrix: Tensor) -> float:
    """Return the Frobenius norm, summed in float64."""
    return torch.linalg.vector_norm(matrix, dtype=torch.float64).item()


def features(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return the features of an adapter beyond A and B of linears with one scale α/r, each with its effect.

    `values` is its adapter_config.json, `shapes` has the shapes of its tensors by their names in the file.
    """
    places = {name: parse_tensor_name(name) for name in shapes}
    found = {field for field in FOLDED | NOT_PLAIN if values.get(field) not in (None, False, "none", [], {})}
    found |= {FIELD_OF_TENSOR[key] for _, key in places.values() if key in FIELD_OF_TENSOR}
    if any(not module for module, _ in places.values()) and not found & {"modules_to_save", "bias"}:
        found.add("modules_to_save")
    if any("lora_embedding_" in name for name in places):
        found.add("embeddings")
    if any(key == "lora_A" and len(shapes[name]) > 2 for name, (_, key) in places.items()):
        found.add("convolutions")
    effects = {name: effect for name, effect in (FOLDED | NOT_PLAIN | KEPT).items() if name in found}
    if (init := values.get("init_lora_weights", True)) not in PLAIN_INITS:
        effects["init_lora_weights"] = f"{init!r:.60} changes the base's weights at the start"
    return effects | {key: f"{value!r:.60}" for key, value in unknown_fields(values).items()}
