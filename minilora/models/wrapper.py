"""Read the text model of a wrapper, such as a model that also sees images.

Its config.json has the model's own under `text_config`, and its tensors the model's under a longer name:

    model.language_model.layers.0.mlp.up_proj.weight   or   language_model.model.layers.0.mlp.up_proj.weight
    ->               model.layers.0.mlp.up_proj.weight

Other tensors (vision, multi-token prediction `mtp.`) are not read.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.files import TensorFile, read_json, tensor_files
from minilora.llama import REQUIRED

SIZES = {  # the defaults of `REQUIRED` in transformers' classes; of a part's config, version 4 wrote only what differs
    "gemma3_text": (262_208, 2304, 9216, 26, 8),
    "llama": (32_000, 4096, 11_008, 32, 32),
    "mistral": (32_000, 4096, 14_336, 32, 32),
    "qwen2": (151_936, 4096, 22_016, 32, 32),
}
SHARED = ("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings")  # set by the wrapper for all its parts
TEXT = re.compile(r"model\.language_model\.(?P<rest>.+)|language_model\.(?P<model>(?:model|lm_head)\..+)|lm_head\..+")


def text_config(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of the text model in a wrapper's, or the config itself."""
    text = source.get("text_config")
    if not isinstance(text, Mapping):
        return source
    sizes = dict(zip(REQUIRED, SIZES.get(str(text.get("model_type")), ()), strict=False))
    missing = {key: size for key, size in sizes.items() if text.get(key) is None}
    return {**text, **missing, **{key: source[key] for key in SHARED if source.get(key) is not None}}


def text_name(name: str) -> str | None:
    """Return the name of a wrapper's tensor in the text model, or None for a tensor of another part.

    >>> text_name("model.language_model.norm.weight"), text_name("language_model.lm_head.weight"), text_name("mtp.fc")
    ('model.norm.weight', 'lm_head.weight', None)
    """
    match = TEXT.fullmatch(name)
    if match is None:
        return None
    return f"model.{match['rest']}" if match["rest"] else match["model"] or name


def text_path(path: str) -> str:
    """Return the path in the text model that a path in an adapter means, whatever wrapped the model in training.

    >>> text_path("_orig_mod.model.language_model.layers.0.mlp.up_proj.base_layer")
    'model.layers.0.mlp.up_proj'
    """
    path = path.replace("_orig_mod.", "").removesuffix(".base_layer")
    return (text_name(f"{path}.weight") or f"{path}.weight").removesuffix(".weight")


def is_wrapper(directory: Path) -> bool:
    """Return whether a model directory has a text model in a wrapper."""
    return isinstance(read_json(directory / "config.json").get("text_config"), Mapping)


def text_files(directory: Path, is_mapped_once: bool = False) -> dict[str, TensorFile]:
    """Return the files of a directory by the names of tensors in the text model; see `tensor_files`."""
    return tensor_files(directory, is_mapped_once, text_name if is_wrapper(directory) else None)


def describe_other_parts(directory: Path) -> str:
    """Return which tensors of a wrapper are not read, as "model.visual (153 tensors), mtp (9 tensors)", or ""."""
    if not is_wrapper(directory):
        return ""
    others = [name for name in tensor_files(directory) if text_name(name) is None]
    parts = Counter(".".join(name.split(".")[: 1 + name.startswith("model.")]) for name in others)
    return ", ".join(f"{part} ({count:,} tensors)" for part, count in sorted(parts.items()))
