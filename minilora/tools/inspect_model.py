"""What a model directory holds, also one that minilora does not run. Only the headers of its files are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.errors import FormatError, MiniloraError
from minilora.models.bitsandbytes import packed_weights, read_layout
from minilora.models.checkpoint import read_config
from minilora.models.classifier import load_for
from minilora.models.shards import tensor_files
from minilora.models.tokenizer import Tokenizer
from minilora.storage import TensorEntry, TensorFile, read_json
from minilora.tools.inspect_readers import minilora_problems, transformers_problems


@dataclass(frozen=True)
class ModelFacts:
    """A model: its config.json as it is, each file with its bytes, each tensor; `problems` as of an adapter.

    A packed weight is one tensor, of the dtype NF4 or FP4, with its own shape and the bytes of all its parts.
    """

    path: str
    config: dict[str, Any]
    files: dict[str, int]
    tensors: dict[str, TensorEntry]
    tokenizer: dict[str, Any]
    problems: dict[str, list[str]]


def model_facts(directory: Path) -> ModelFacts:
    """What the model in a directory holds.

    Raises:
        FormatError: a file is missing or damaged.
    """
    config, held = read_json(directory / "config.json"), tensor_files(directory)
    files = {file.path: file for file in held.values()}
    return ModelFacts(
        path=str(directory),
        config=config,
        files={path.name: path.stat().st_size for path in files},
        tensors=_tensors(held),
        tokenizer=_tokenizer(directory),
        problems={
            # On the device "meta" it checks the same and reads no number.
            "minilora": minilora_problems(lambda: _load(directory)),
            "transformers": transformers_problems(config, [file.metadata for file in files.values()]),
        },
    )


def _load(directory: Path) -> None:
    load_for(read_config(directory).unit, (), directory, "auto", "meta", None)


def _tensors(files: dict[str, TensorFile]) -> dict[str, TensorEntry]:
    entries = {name: file.entries[name] for name, file in files.items()}
    for name, parts in packed_weights(files).items():
        try:
            layout, _ = read_layout(files[parts[0]], parts[0])
        except FormatError:  # of another version, or damaged: each part stands for itself
            continue
        size = sum(entries.pop(part).bytes for part in parts)
        entries[name] = TensorEntry(layout.quant_type.upper(), layout.shape, size)
    return dict(sorted(entries.items()))


def _tokenizer(directory: Path) -> dict[str, Any]:
    try:
        tokenizer = Tokenizer(directory)
    except MiniloraError as error:
        return {"problem": str(error)}
    has_template = tokenizer.template is not None
    return {"tokens": len(tokenizer), **tokenizer.special_tokens, "chat_template": "yes" if has_template else "no"}
