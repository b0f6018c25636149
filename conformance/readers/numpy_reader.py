"""Compute logits of a base and its adapters by loops in float64, from the files alone, as the README explains them.

    python -m conformance.readers.numpy_reader BASE TOKENS OUT [ADAPTER ...]

The decoder is that of `tests/reference_model.py`.
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.reference_model import decoder_logits, gemma3_logits

Array = NDArray[Any]
Tensors = dict[str, Array]
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1"}
STATE = ".quant_state.bitsandbytes__nf4"
PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Case(NamedTuple):
    """The contents of the files: config.json and tensors of the base, JSON and tensors of each adapter."""

    config: dict[str, Any]
    tensors: Tensors
    adapters: Sequence[tuple[dict[str, Any], Tensors]]


def read_case(base: Path, adapters: Sequence[Path]) -> Case:
    """Read all files."""
    config = json.loads((base / "config.json").read_bytes())
    read = [
        (json.loads((path / "adapter_config.json").read_bytes()), read_tensors(path / "adapter_model.safetensors"))
        for path in adapters
    ]
    return Case(config, read_tensors(base / "model.safetensors"), read)


def read_tensors(path: Path) -> Tensors:
    """Read safetensors: the length of the header in 8 bytes, the header in JSON, the numbers."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        numbers = np.frombuffer(data[begin + first : begin + last], DTYPES[entry["dtype"]])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            numbers = (numbers.astype("<u4") << 16).view("<f4")
        tensors[name] = numbers.reshape(entry["shape"])
    return tensors


def logits(case: Case, tokens: Sequence[int]) -> Array:
    """Return the logits of one document.

    Shapes: tokens (N) -> (N, V)
    """
    config = SimpleNamespace(**case.config)
    tensors = adapted(dense(case.tensors), case.adapters)
    if config.model_type == "gemma3_text":
        thetas = {"sliding_attention": config.rope_local_base_freq, "full_attention": config.rope_theta}
        rotations = {kind: rotation(config.head_dim, theta, len(tokens)) for kind, theta in thetas.items()}
        return gemma3_logits(tensors, config, tokens, rotations)
    return decoder_logits(tensors, config, tokens, *rotation(config.head_dim, config.rope_theta, len(tokens)))


def rotation(width: int, theta: float, length: int) -> tuple[Array, Array]:
    """Return cos and sin of position · θ^(-2i/E)."""
    angles = np.array([[n * theta ** (-2 * i / width) for i in range(width // 2)] for n in range(length)])
    return np.cos(angles), np.sin(angles)


# --- 4-bit weights ---


def dense(tensors: Mapping[str, Array]) -> Tensors:
    """Return the tensors of a base with 4-bit weights dequantized; the others are the same."""
    packed = {name.removesuffix(STATE) for name in tensors if name.endswith(STATE)}
    parts = {f"{name}{end}" for name in packed for end in PARTS}
    plain = {name: tensor for name, tensor in tensors.items() if name not in packed | parts}
    return plain | {name: dequantized(tensors, name) for name in packed}


PARTS = (STATE, ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


def dequantized(tensors: Mapping[str, Array], name: str) -> Array:
    """w = level · absmax of its block;  absmax = its level · its scale + offset; each operation rounded to float32."""
    state = json.loads(bytes(tensors[name + STATE]))
    n = math.prod(state["shape"])
    codes = [code for byte in tensors[name].ravel() for code in (byte >> 4, byte & 15)][:n]
    absmax = tensors[f"{name}.absmax"]
    if f"{name}.nested_absmax" in tensors:
        levels, scales = tensors[f"{name}.nested_quant_map"], tensors[f"{name}.nested_absmax"]
        offset, size = np.float32(state["nested_offset"]), state["nested_blocksize"]
        absmax = np.array([levels[code] * scales[i // size] + offset for i, code in enumerate(absmax)])
    levels, size = tensors[f"{name}.quant_map"], state["blocksize"]
    return np.array([levels[code] * absmax[i // size] for i, code in enumerate(codes)]).reshape(state["shape"])


# --- adapters ---


def adapted(tensors: Tensors, adapters: Sequence[tuple[dict[str, Any], Tensors]]) -> Tensors:
    """Return the tensors of the base with the adapters in them, one after the other, in float64."""
    result = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    result.setdefault(HEAD, result[EMBEDDING])  # from here on a tied head is a matrix of its own
    for values, stored in adapters:
        adapter = {name.removeprefix(PREFIX): tensor.astype(np.float64) for name, tensor in stored.items()}
        for name, tensor in adapter.items():
            if text_name(name) in result:
                result[text_name(name)] = tensor  # a module in full, or a bias of a module without A and B
        for path in sorted({path_of(name) for name in adapter if "lora_" in name}):
            apply(result, path, values, adapter)
        if (rows := adapter.get(f"model.embed_tokens{ROWS}")) is not None:
            asked = values["trainable_token_indices"]
            tokens = asked if isinstance(asked, list) else asked["embed_tokens"]
            for name in (EMBEDDING,) if HEAD in tensors else (EMBEDDING, HEAD):
                result[name] = result[name].copy()
                result[name][tokens] = rows
    return result


def text_name(name: str) -> str:
    """Return the name without the prefix, and without the wrapper's, whose text model is the base here."""
    return name.removeprefix(PREFIX).replace("language_model.", "", 1)


def path_of(name: str) -> str:
    return name.partition(".lora_")[0]


def scale(values: Mapping[str, Any], path: str, r: int) -> float:
    """s = α/r, or α/√r for rsLoRA; r is that of the tensors, and patterns are matched against the path in the file."""
    alpha = matched(values.get("alpha_pattern"), path, values.get("lora_alpha", 8))
    return alpha / (math.sqrt(r) if values.get("use_rslora") else r)


def matched(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Return the value of the first key that is the path or ends it, as a regular expression, or the default."""
    return next((v for key, v in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({key})", path)), default)


def factors(adapter: Mapping[str, Array], path: str) -> tuple[Array, Array]:
    """Return a factor (out, r) and another (r, in) of the update of a weight (out, in).

    An embedding (V, D), whose rows are looked up, is a matrix from D to V, and its update the transpose of B A.
    """
    if f"{path}.lora_A.weight" in adapter:
        return adapter[f"{path}.lora_B.weight"], adapter[f"{path}.lora_A.weight"]
    return adapter[f"{path}.lora_embedding_A"].T, adapter[f"{path}.lora_embedding_B"].T


def apply(tensors: Tensors, path: str, values: Mapping[str, Any], adapter: Mapping[str, Array]) -> None:
    """W ← W + s·B A, or (m / ‖W + s·B A‖) (W + s·B A), row by row;  b ← the trained b + s·b_B."""
    left, right = factors(adapter, path)
    weight, update = f"{text_name(path)}.weight", 0.0
    s = scale(values, path, len(right))
    for column, row in zip(left.T, right, strict=True):
        update = update + np.outer(column, row)
    W = tensors[weight] + s * update
    if (magnitude := adapter.get(f"{path}.lora_magnitude_vector")) is not None:
        W = np.array([m * row / math.sqrt(math.fsum(row * row)) for m, row in zip(magnitude, W, strict=True)])
    tensors[weight] = W
    name = f"{text_name(path)}.bias"
    bias = adapter.get(f"{path}.base_layer.bias", tensors.get(name, 0.0))
    if f"{path}.lora_B.bias" in adapter:
        bias = bias + s * adapter[f"{path}.lora_B.bias"]
    if np.ndim(bias):
        tensors[name] = np.asarray(bias)


if __name__ == "__main__":
    base, tokens, out, *adapters = map(Path, sys.argv[1:])
    np.save(out, logits(read_case(base, adapters), json.loads(tokens.read_bytes())))
