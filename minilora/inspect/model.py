"""What a model directory holds, also one that minilora does not run. Only the headers of its files are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.errors import ConfigError, MiniloraError
from minilora.inspect.readers import Reader, model_readers
from minilora.inspect.tensors import FileFacts, TensorFacts, dtype_counts, file_facts
from minilora.model.checkpoint import INDEX, load_model
from minilora.model.config import LlamaConfig
from minilora.model.tokenizer import Tokenizer
from minilora.storage import read_json, shard_names

SIZES = {  # as the config calls them, and in words
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "intermediate_size": "MLP width",
    "num_attention_heads": "heads",
    "num_key_value_heads": "key-value heads",
    "head_dim": "head width",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "context",
}
PARTS = {  # the first word that is in a tensor's name says what it is part of
    "norm": "norms",
    "embed": "embedding",
    "lm_head": "head",
    "attn": "attention",
    "attention": "attention",
    "mlp": "MLP",
}


@dataclass(frozen=True)
class TokenizerFacts:
    """A tokenizer: how many tokens, its special tokens by role, and whether it has a chat template."""

    vocabulary: int
    special_tokens: dict[str, str]
    has_chat_template: bool


@dataclass(frozen=True)
class ModelFacts:
    """A model; sizes are those of its config, numbers of parameters those that the files hold.

    `windows` maps how far back layers look to how many do so, where that is not all the way; `quantized` is the method.
    """

    path: str
    architectures: list[str]
    model_type: str | None
    sizes: dict[str, int]
    rope: dict[str, Any]
    windows: dict[int, int]
    tied: bool | None
    quantized: str | None
    parameters: int
    parts: dict[str, int]
    dtypes: dict[str, int]
    files: dict[str, int]
    tokenizer: TokenizerFacts | None
    tokenizer_problem: str | None
    readers: tuple[Reader, ...]


def model_facts(directory: Path) -> ModelFacts:
    """What the model in a directory holds.

    Raises:
        FormatError: a file is missing or damaged.
    """
    source = read_json(directory / "config.json")
    files = _files(directory)
    tensors = [tensor for file in files for tensor in file.tensors]
    tokenizer, tokenizer_problem = _tokenizer(directory)
    config, tied = _config(source), source.get("tie_word_embeddings")
    names = source.get("architectures")
    return ModelFacts(
        path=str(directory),
        architectures=[name for name in names if isinstance(name, str)] if isinstance(names, list) else [],
        model_type=source["model_type"] if isinstance(source.get("model_type"), str) else None,
        sizes=_sizes(source, config),
        rope=_rope(source, config),
        windows=dict(Counter(window for window in config.windows if window)) if config else {},
        tied=config.tie_word_embeddings if config else tied if isinstance(tied, bool) else None,
        quantized=_quantized(source),
        parameters=sum(tensor.count for tensor in tensors),
        parts=_parts(tensors),
        dtypes=dtype_counts(tensors),
        files={Path(file.path).name: file.bytes for file in files},
        tokenizer=tokenizer,
        tokenizer_problem=tokenizer_problem,
        readers=model_readers(source, [file.metadata.get("format") for file in files], _problems(directory)),
    )


def _files(directory: Path) -> list[FileFacts]:
    index = directory / INDEX
    names = sorted(set(shard_names(index).values())) if index.is_file() else ["model.safetensors"]
    return [file_facts(directory / name) for name in names]


def _problems(directory: Path) -> list[str]:
    """Why `load_model` refuses the model. On the device "meta" it checks the same and reads no number."""
    try:
        load_model(directory, device="meta")
    except MiniloraError as error:
        return [line.strip() for line in str(error).splitlines()]
    return []


def _tokenizer(directory: Path) -> tuple[TokenizerFacts | None, str | None]:
    """The tokenizer, or why there is none."""
    try:
        tokenizer = Tokenizer(directory)
    except MiniloraError as error:
        return None, str(error)
    return TokenizerFacts(len(tokenizer), tokenizer.special_tokens, tokenizer.template is not None), None


def _config(source: Mapping[str, Any]) -> LlamaConfig | None:
    try:
        return LlamaConfig.from_dict(source)
    except ConfigError:
        return None


def _sizes(source: Mapping[str, Any], config: LlamaConfig | None) -> dict[str, int]:
    known = {**source, **vars(config), "max_position_embeddings": config.rope.max_length} if config else source
    return {name: known[name] for name in SIZES if isinstance(known.get(name), int)}


def _rope(source: Mapping[str, Any], config: LlamaConfig | None) -> dict[str, Any]:
    """Kind, base and the numbers that stretch it."""
    if config is not None:
        scaling = {k: v for k, v in config.rope.scaling.items() if k not in ("type", "rope_type", "rope_theta")}
        return {"type": config.rope.kind, "theta": config.rope.theta, **scaling}
    given = source.get("rope_parameters") or source.get("rope_scaling")
    return dict(given) if isinstance(given, dict) else {}


def _quantized(source: Mapping[str, Any]) -> str | None:
    found = source.get("quantization_config")
    if not found:
        return None
    return str(found.get("quant_method", "unknown")) if isinstance(found, dict) else "unknown"


def _parts(tensors: Iterable[TensorFacts]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[next((part for word, part in PARTS.items() if word in tensor.name), "other")] += tensor.count
    return dict(counts.most_common())
