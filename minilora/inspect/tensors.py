"""What a safetensors file holds: its header alone is read, so a file may be larger than the memory."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from minilora.errors import FormatError


@dataclass(frozen=True)
class TensorFacts:
    """One tensor; `dtype` as the file spells it (BF16, F32, …)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class FileFacts:
    """A file: the header, which is the 8 bytes of its length and itself, and the tensors' bytes are all of it."""

    path: str
    bytes: int
    header_bytes: int
    metadata: dict[str, str]
    tensors: tuple[TensorFacts, ...]


def file_facts(path: Path) -> FileFacts:
    """What a safetensors file holds.

    Raises:
        FormatError: there is no such file, or its header is not that of a safetensors file or does not fit it.
    """
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    try:
        # Checks the header: no gaps, sizes that fit dtype and shape. For PyTorch, it would count the file as memory.
        with safe_open(path, framework="numpy"), path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path}: not a safetensors file ({error})") from error
    metadata = header.pop("__metadata__", None) or {}
    tensors = [_tensor_facts(name, header[name]) for name in sorted(header)]
    return FileFacts(str(path), path.stat().st_size, 8 + length, metadata, tuple(tensors))


def _tensor_facts(name: str, entry: dict[str, Any]) -> TensorFacts:
    begin, end = entry["data_offsets"]
    return TensorFacts(name, entry["dtype"], tuple(entry["shape"]), end - begin)


def dtype_counts(tensors: Iterable[TensorFacts]) -> dict[str, int]:
    """Dtype -> how many numbers have it, the most frequent first."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.dtype] += tensor.count
    return dict(counts.most_common())
