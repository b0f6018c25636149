"""The directory of a LoRA adapter in PEFT's layout, read once more: names and shapes, but no numbers.

    adapter_config.json         {"peft_type": "LORA", "r": …, "lora_alpha": …, "target_modules": […], …}
    adapter_model.safetensors   base_model.model.<path>.lora_A.weight (r, in), lora_B.weight (out, r), …

Nothing here is shared with `minilora.adapters`. Patterns of the config are run as regular expressions, as PEFT does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
FACTORS = {  # key -> the end of the tensor's name
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "embedding A": "lora_embedding_A",
    "embedding B": "lora_embedding_B",
    "B's bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
    "diagonal": "lora_diag",  # KaSA's
    "base weight": "base_layer.weight",
    "base bias": "base_layer.bias",
    "rows": "token_adapter.trainable_tokens_delta",
}
EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")  # PEFT adds them if the vocabulary was changed
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Adapter:
    """An adapter's config, and the shapes of its tensors.

    Attributes:
        parts: path of an adapted module -> key of `FACTORS` -> shape.
        others: the names of tensors of the model itself, without the prefix.
        strange: the names of tensors without the prefix that all have.
    """

    path: Path
    config: dict[str, Any]
    parts: dict[str, dict[str, Shape]]
    others: tuple[str, ...]
    strange: tuple[str, ...]

    @property
    def factors(self) -> dict[str, tuple[Shape, Shape]]:
        """The shapes of A and B by path, where both are there."""
        pairs = {
            path: (own.get("A") or own.get("embedding A"), own.get("B") or own.get("embedding B"))
            for path, own in self.parts.items()
        }
        return {path: (A, B) for path, (A, B) in pairs.items() if A and B}

    def listed(self, key: str) -> list[str]:
        """Return a list of names in the config, which may be null."""
        value = self.config.get(key) or []
        return [value] if isinstance(value, str) else list(value)


def read(path: Path) -> Adapter:
    """Read config and header.

    Raises:
        Exception: a file is missing or malformed.
    """
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG}: found {config!r:.40}, accepted is an object")
    with safe_open(path / WEIGHTS, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no dict
    parts: dict[str, dict[str, Shape]] = {}
    others, strange = [], []
    for name, shape in shapes.items():
        key = next((key for key, end in FACTORS.items() if name.endswith(f".{end}")), None)
        if not name.startswith(PREFIX):
            strange.append(name)
        elif key is None:
            others.append(name.removeprefix(PREFIX))
        else:
            where = name.removeprefix(PREFIX).removesuffix(f".{FACTORS[key]}")
            parts.setdefault(where, {})[key] = shape
    return Adapter(path, config, parts, tuple(others), tuple(strange))


def belongs(adapter: Adapter, name: str) -> bool:
    """Return whether a parameter of the model is one that is saved: of a module trained in full, or a bias."""
    is_bias = name.endswith(".bias") and adapter.config.get("bias", "none") == "all"
    return (
        is_bias or name.endswith(EMBEDDINGS) or any(meant(name, entry) for entry in adapter.listed("modules_to_save"))
    )


def meant(name: str, entry: str) -> bool:
    """Return whether a parameter is of a module whose path ends with an entry: PEFT compares the ends as text."""
    return any(name[: dot.start()].endswith(entry) for dot in re.finditer(r"\.", name))


def first_match(keys: Iterable[str], where: str) -> str | None:
    """Return the first key of a pattern that matches a module's path, as PEFT does: anchored at a dot and the end."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", where)), None)


def is_target(where: str, target: str | list[str]) -> bool:
    """Return whether `target_modules` means a module: a regular expression, or ends of paths."""
    if isinstance(target, str):
        return re.fullmatch(target, where) is not None
    return any(where == entry or where.endswith(f".{entry}") for entry in target)
