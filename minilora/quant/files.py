"""4-bit weights on disk, in the layout of bitsandbytes 0.50.

Beside `<path>.weight`, the packed weight (⌈n/2⌉, 1), lie

    .absmax             uint8 (b) with double quantization, else float32 (b)
    .quant_map          float32 (16), the levels
    .nested_absmax      float32 (⌈b/256⌉)  and  .nested_quant_map, float32 (256): with double quantization
    .quant_state.bitsandbytes__nf4   the bytes of a JSON object: shape, dtype, block size, the offset

The levels in a file are those of the format; they are compared, not used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from minilora.errors import FormatError
from minilora.quant.linear import NF4Linear
from minilora.quant.nf4 import BLOCK_SIZES, CODEBOOKS, DYNAMIC_MAP, NESTED_BLOCK_SIZE, Layout, Packed
from minilora.storage import TensorFile

STATE = re.compile(r"(?P<weight>.+\.weight)\.quant_state\.bitsandbytes__(?P<kind>\w+)")
STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def packed_weights(names: Iterable[str]) -> dict[str, list[str]]:
    """Name of each packed weight -> the names of all its tensors; the first is the JSON object's."""
    names = set(names)
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if state := STATE.fullmatch(name):
            weight = state["weight"]
            found[weight] = [name, weight, *(f"{weight}.{part}" for part in STATISTICS if f"{weight}.{part}" in names)]
    return found


def read_layout(file: TensorFile, name: str) -> tuple[Layout, dict[str, Any]]:
    """What the JSON object of that name says of its weight.

    Raises:
        FormatError: it is not such an object, or names a format that is not known here.
    """
    where = f"{file.path}: {name}"
    try:
        state = json.loads(bytes(file.read(name).flatten().tolist()))
        N, K = state["shape"]
        block_size, dtype, kind = state["blocksize"], DTYPES[state["dtype"]], state["quant_type"]
        if not (isinstance(N, int) and isinstance(K, int) and N > 0 and K > 0):
            raise ValueError(f"shape {state['shape']}")
        if kind not in CODEBOOKS or block_size not in BLOCK_SIZES:
            raise ValueError(f"quant_type {kind!r}, blocksize {block_size!r}")
        nested = [state[key] for key in ("nested_blocksize", "nested_offset") if key in state]
        if nested and not (nested[0] == NESTED_BLOCK_SIZE and isinstance(nested[-1], float)):
            raise ValueError(f"nested_blocksize and nested_offset {nested}")
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{where}: not the state of a 4-bit weight that can be read ({error!r})") from error
    return Layout((N, K), dtype, block_size, kind), state


def read_packed(files: Mapping[str, TensorFile], names: list[str], device: torch.device) -> tuple[Packed, Layout]:
    """The packed weight whose tensors have these names, the first being its JSON object's.

    Raises:
        FormatError: a tensor is missing or has the wrong size or dtype, or its levels are not those of the format.
    """
    state_name, weight, *_ = names
    layout, state = read_layout(files[state_name], state_name)
    n = layout.shape[0] * layout.shape[1]
    blocks = -(-n // layout.block_size)

    def read(name: str, size: int, *dtypes: torch.dtype) -> Tensor:
        if name not in files:
            raise FormatError(f"{files[state_name].path}: {name} is missing")
        tensor = files[name].read(name)
        if name == weight:  # written as any dtype, it is bytes all the same
            tensor = tensor.contiguous().view(torch.uint8)
        if tensor.numel() != size or tensor.dtype not in dtypes:
            found = f"{tensor.numel()} of {tensor.dtype}"
            raise FormatError(f"{files[name].path}: {name} holds {found}, need {size} of {dtypes[0]}")
        return tensor.flatten()

    def check(name: str, levels: Tensor) -> None:
        if not torch.equal(read(name, len(levels), torch.float32), levels):
            raise FormatError(f"{files[state_name].path}: {name} holds other levels than those of the format")

    packed = read(weight, (n + 1) // 2, torch.uint8).to(device, copy=True)
    check(f"{weight}.quant_map", CODEBOOKS[layout.quant_type])
    if "nested_offset" not in state:
        absmax = read(f"{weight}.absmax", blocks, torch.float32).to(device, copy=True)
        return Packed(packed, absmax, None, None), layout
    check(f"{weight}.nested_quant_map", DYNAMIC_MAP)
    absmax = read(f"{weight}.absmax", blocks, torch.uint8).to(device, copy=True)
    # In what bitsandbytes saves after an evaluation on some processors the scales are bfloat16.
    scales = read(f"{weight}.nested_absmax", -(-blocks // NESTED_BLOCK_SIZE), torch.float32, torch.bfloat16)
    offset = torch.tensor(state["nested_offset"], device=device)
    return Packed(packed, absmax, scales.to(device, torch.float32, copy=True), offset), layout


def packed_tensors(weight: str, linear: NF4Linear) -> dict[str, Tensor]:
    """The tensors of a packed weight, by the names that they have in a file."""
    (packed, absmax, scales, offset), layout = linear.parts, linear.layout
    state: dict[str, Any] = {
        "quant_type": layout.quant_type,
        "blocksize": layout.block_size,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "shape": list(layout.shape),
    }
    tensors = {
        weight: packed.reshape(-1, 1),
        f"{weight}.absmax": absmax.reshape(-1),
        f"{weight}.quant_map": CODEBOOKS[layout.quant_type].clone(),  # each its own, or it is refused
    }
    if scales is not None and offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": offset.item()}
        tensors |= {f"{weight}.nested_absmax": scales, f"{weight}.nested_quant_map": DYNAMIC_MAP.clone()}
    text = json.dumps(state).encode()
    tensors[f"{weight}.quant_state.bitsandbytes__{layout.quant_type}"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors


def quantization_config(held: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any] | None:
    """The entry of a config.json about a model that is held as `describe` says, with all keys that transformers writes.

    Which linears stay dense is named, unless it is the head alone.
    """
    if held["quantize"] == "none":
        return None
    skipped = held["quantize_skip"]
    return {
        "quant_method": "bitsandbytes",
        "_load_in_8bit": False,
        "_load_in_4bit": True,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": [*skipped, "lm_head"] if skipped else None,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": held["quantize"],
        "bnb_4bit_use_double_quant": held["double_quant"],
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "load_in_4bit": True,
        "load_in_8bit": False,
    }


def is_four_bit(source: Mapping[str, Any]) -> bool:
    """Does a config.json say that its checkpoint is one of these?"""
    entry = source.get("quantization_config")
    return (
        isinstance(entry, Mapping)
        and entry.get("quant_method", "bitsandbytes") == "bitsandbytes"
        and (entry.get("load_in_4bit") is True or entry.get("_load_in_4bit") is True)
    )
