"""Tensors of a model directory: in one safetensors file, or in several with an index of which holds what."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from minilora.errors import FormatError
from minilora.storage import TensorFile, remove, shard_names, write_json, write_tensors

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"


def tensor_files(directory: Path) -> dict[str, TensorFile]:
    """Tensor name -> the file that holds it."""
    index = directory / INDEX
    if not index.is_file():
        file = TensorFile(directory / "model.safetensors")
        return dict.fromkeys(file.shapes, file)
    weight_map = shard_names(index)
    shards = {name: TensorFile(directory / name) for name in sorted(set(weight_map.values()))}
    if lacking := sorted(name for name, shard in weight_map.items() if name not in shards[shard].shapes):
        raise FormatError(f"{index}: names tensors that their shards do not hold: {lacking[:5]}")
    return {name: shards[shard] for name, shard in weight_map.items()}


def write_shards(directory: Path, groups: Iterable[Mapping[str, Tensor]], limit: int) -> None:
    """Write groups of tensors, in order, into files of at most `limit` bytes; a group is never divided.

    Only one file's tensors are held at a time, and on the CPU. How many files there are is known at the end: until
    then they have temporary names. What a directory held before goes, and what a writer that was killed left.
    """
    written: list[tuple[Path, list[str], int]] = []
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        path = directory / f".model-{len(written) + 1:05d}.tmp"
        write_tensors(path, shard)
        written.append((path, list(shard), _bytes(shard)))
        shard.clear()

    for left in directory.glob(".*model-*.tmp"):
        remove(left)
    try:
        for group in map(_on_cpu, groups):
            if shard and _bytes(shard) + _bytes(group) > limit:
                flush()
            shard |= group
        flush()
        files = [_file(i, len(written)) for i in range(len(written))]
        remove(directory / INDEX)  # or what it names would be a mixture for a moment
        for (path, *_), file in zip(written, files, strict=True):
            os.replace(path, directory / file)
    finally:
        for path, *_ in written:
            remove(path)
    if len(files) > 1:
        weight_map = {name: file for (_, names, _), file in zip(written, files, strict=True) for name in names}
        total = sum(size for *_, size in written)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for old in [directory / "model.safetensors", *directory.glob("model-*-of-*.safetensors")]:
        if old.name not in files:
            remove(old)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _file(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
