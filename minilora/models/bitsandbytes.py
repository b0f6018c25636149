"""Which linears are quantized, and 4-bit weights on disk in the layout of bitsandbytes 0.50.

A file contains `<path>.weight`, the packed weight (⌈n/2⌉, 1), and

    .absmax             uint8 (b) with double quantization, else float32 (b)
    .quant_map          float32 (16), the levels
    .nested_absmax      float32 (⌈b/256⌉)  and  .nested_quant_map, float32 (256): with double quantization
    .quant_state.bitsandbytes__nf4   the bytes of a JSON object: shape, dtype, block size, the offset

The levels in a file are compared with those of the format, and not used.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minilora.adapter import linear_layers
from minilora.errors import FormatError, TrainingError
from minilora.files import TensorFile, entry_bytes, parse_object
from minilora.nf4 import BLOCK_SIZE, DYNAMIC_MAP, LEVELS, NESTED_BLOCK_SIZE, Layout, NF4Linear, Packed
from minilora.options import check_types, document_fields, option

Weight = Tensor | NF4Linear  # dense, or packed in a linear that has no bias yet

Quantize = Literal["none", "nf4"]


@document_fields
@dataclass(frozen=True)
class QuantizeConfig:
    """How the weights of a base model are stored."""

    quantize: Quantize = option(
        "none", "nf4: keep the linear layers of the base model, all but the head, in 4 bits, to save memory"
    )
    double_quant: bool = option(True, "also quantize the scales: 4.127 bits per weight instead of 4.5")

    def __post_init__(self) -> None:
        check_types(self)

    @classmethod
    def of(cls, value: "QuantizeConfig | Quantize | None") -> "QuantizeConfig":
        """Return a config unchanged, or make one from the name of a format; None is "none"."""
        return value if isinstance(value, cls) else cls(value or "none")  # type: ignore[arg-type]

    def chosen(self, linears: Iterable[str]) -> set[str]:
        """Return which of a model's linears (paths) to quantize."""
        return set() if self.quantize == "none" else {*linears} - {"lm_head"}


def shortest_names(chosen: Sequence[str], modules: Sequence[str], as_text: bool = False) -> list[str]:
    """Return short names of some modules (paths): the last components if no other module has them, else the paths.

    Compared `as_text`, "norm" also means "input_layernorm".
    """
    endings = {path.rpartition(".")[2] for path in chosen}
    compared = tuple(endings if as_text else (f".{name}" for name in endings))
    meant = {path for path in modules if f".{path}".endswith(compared)}
    return sorted(endings) if meant == set(chosen) else sorted(chosen)


BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FP4_LEVELS = tuple(sign * level / 12 for sign in (1, -1) for level in (0, 0.0625, 8, 12, 4, 6, 2, 3))
CODEBOOKS = {"nf4": LEVELS, "fp4": FP4_LEVELS}  # fp4 is only read
STATE = re.compile(r"(?P<weight>.+\.weight)\.quant_state\.bitsandbytes__(?P<kind>\w+)")
STATE_BYTES = 4096  # at most; bitsandbytes writes 170
FLOAT32_MAX = torch.finfo(torch.float32).max
STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in a config.json."""
    return str(dtype).removeprefix("torch.")


PACKED_DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def packed_weights(names: Iterable[str]) -> dict[str, list[str]]:
    """Return for each packed weight the names of its tensors: the JSON object, the weight, the statistics."""
    names = set(names)
    packed: dict[str, list[str]] = {}
    for name in sorted(names):
        if (state := STATE.fullmatch(name)) and (weight := state["weight"]) in names:
            packed[weight] = [name, weight, *(f"{weight}.{part}" for part in STATISTICS if f"{weight}.{part}" in names)]
    return packed


def read_layout(file: TensorFile, name: str) -> tuple[Layout, float | None]:
    """Read the JSON object of a packed weight; return the layout, and the offset of double quantization."""
    stored = file.read(name)
    if stored.dtype != torch.uint8 or stored.numel() > STATE_BYTES:
        raise FormatError(
            f"{file.path}: {name} has {stored.numel()} numbers of {stored.dtype}, need JSON as torch.uint8"
        )
    state = parse_object(bytes(stored.flatten().tolist()), f"{file.path}: {name}")
    values: list[Any] = [state.get(key) for key in ("shape", "dtype", "blocksize", "quant_type", "nested_offset")]
    shape, dtype, block_size, kind, offset = values
    is_right = {
        "shape": isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape),
        "blocksize": type(block_size) is int and block_size in BLOCK_SIZES,
        "dtype": str(dtype) in PACKED_DTYPES,
        "quant_type": str(kind) in CODEBOOKS and name.endswith(f"__{kind}"),
    }
    if "nested_blocksize" in state or "nested_offset" in state:
        is_right["nested_blocksize"] = state.get("nested_blocksize") == NESTED_BLOCK_SIZE
        is_right["nested_offset"] = type(offset) is float and abs(offset) <= FLOAT32_MAX
    if wrong := {key: state.get(key) for key, right in is_right.items() if not right}:
        raise FormatError(f"{file.path}: {name}: found {wrong!s:.300}, which cannot be read")
    return Layout((shape[0], shape[1]), PACKED_DTYPES[dtype], block_size, CODEBOOKS[kind]), offset


def weight_shapes(files: Mapping[str, TensorFile]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors; a packed weight is one, with its unpacked shape."""
    packed = packed_weights(files)
    parts = {part for names in packed.values() for part in names}
    shapes = {name: file.shapes[name] for name, file in files.items() if name not in parts}
    return shapes | {name: read_layout(files[state], state)[0].shape for name, (state, *_) in packed.items()}


def quant_type(layout: Layout) -> str:
    """Return the name of the format of a packed weight."""
    return "nf4" if layout.levels == LEVELS else "fp4"


def read_packed(
    files: Mapping[str, TensorFile], names: list[str], device: torch.device, copy: bool
) -> tuple[Packed, Layout]:
    """Read the packed weight whose tensors have these names, in the order of `packed_weights`."""
    state_name, weight, *_ = names
    layout, nested_offset = read_layout(files[state_name], state_name)
    n = layout.shape[0] * layout.shape[1]
    blocks = -(-n // layout.block_size)

    def read(name: str, size: int, dtype: torch.dtype) -> Tensor:
        if name not in files:
            raise FormatError(f"{files[state_name].path}: {name} is missing")
        tensor = files[name].read(name)
        if name == weight:  # bytes, which may be stored as any dtype
            tensor = tensor.flatten().view(torch.uint8)
        if tensor.numel() != size or tensor.dtype != dtype:
            stored = f"{tensor.numel()} numbers of {tensor.dtype}"
            raise FormatError(f"{files[name].path}: {name} has {stored}, need {size} of {dtype}")
        if dtype == torch.float32 and not tensor.isfinite().all():
            raise FormatError(f"{files[name].path}: {name} has numbers that are not finite")
        return tensor.flatten()

    def check(name: str, levels: Tensor) -> None:  # the last bits differ between machines
        if not torch.allclose(read(name, len(levels), torch.float32), levels, rtol=1e-6, atol=0):
            raise FormatError(f"{files[state_name].path}: {name} has levels that bitsandbytes does not write")

    packed = read(weight, (n + 1) // 2, torch.uint8)
    check(f"{weight}.quant_map", torch.tensor(layout.levels, dtype=torch.float32, device="cpu"))
    absmax = read(f"{weight}.absmax", blocks, torch.float32 if nested_offset is None else torch.uint8)
    scales = offset = None
    if nested_offset is not None:
        check(f"{weight}.nested_quant_map", DYNAMIC_MAP)
        scales = read(f"{weight}.nested_absmax", -(-blocks // NESTED_BLOCK_SIZE), torch.float32).to(device, copy=copy)
        offset = torch.tensor([nested_offset], dtype=torch.float32, device=device)
    return Packed(packed.to(device, copy=copy), absmax.to(device, copy=copy), scales, offset), layout


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite, without the copy that `isfinite` makes of them."""
    return not tensor.numel() or bool(torch.stack(tensor.detach().aminmax()).isfinite().all())


def stored_tensors(name: str, weight: Weight) -> dict[str, Tensor]:
    """Return the tensors of a weight by their names in a file; raise a `TrainingError` if one is not finite."""
    tensors = packed_tensors(name, weight) if isinstance(weight, NF4Linear) else {name: weight}
    if not all(map(is_finite, tensors.values())):
        raise TrainingError(f"{name}: has numbers that are not finite in {weight.dtype}, so it is not saved")
    return tensors


def most_entry_bytes(name: str, weight: Weight) -> int:
    """Return how many bytes a weight may take in the header of a file."""
    if isinstance(weight, NF4Linear):
        return (2 + len(STATISTICS)) * entry_bytes(f"{name}.quant_state.bitsandbytes__nf4")
    return entry_bytes(name)


def packed_tensors(weight: str, linear: NF4Linear) -> dict[str, Tensor]:
    """Return the tensors of a packed weight by their names in a file."""
    (packed, absmax, scales, offset), layout = linear.parts, linear.layout
    dtype = dtype_name(layout.dtype)
    state: dict[str, Any] = {
        "quant_type": quant_type(layout),
        "blocksize": layout.block_size,
        "dtype": dtype if dtype in PACKED_DTYPES else "float32",  # bitsandbytes has no float64
        "shape": list(layout.shape),
    }
    tensors = {
        weight: packed.reshape(-1, 1),
        f"{weight}.absmax": absmax.reshape(-1),
        f"{weight}.quant_map": torch.tensor(layout.levels, dtype=torch.float32, device="cpu"),
    }
    if scales is not None and offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": offset.item()}
        tensors |= {f"{weight}.nested_absmax": scales, f"{weight}.nested_quant_map": DYNAMIC_MAP.clone()}  # not shared
    text = json.dumps(state).encode()
    tensors[f"{weight}.quant_state.bitsandbytes__{quant_type(layout)}"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors


def quantization_config(model: nn.Module, dtype: torch.dtype) -> dict[str, Any] | None:
    """Return the entry of a config.json about a model's linears, with transformers' keys.

    Dense linears are named, unless that is only `lm_head`, which transformers leaves dense by itself.
    """
    quantization, linears = describe_quantization(model), linear_layers(model)
    if quantization["quantize"] == "none":
        return None
    dense = shortest_names([path for path, linear in linears.items() if isinstance(linear, nn.Linear)], [*linears])
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype_name(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quantization["quantize"],
        "bnb_4bit_use_double_quant": quantization["double_quant"],
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None if dense == ["lm_head"] else dense,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def describe_quantization(model: nn.Module) -> dict[str, Any]:
    """Describe how a model's linears, adapted or not, are stored, with the names of the flags as keys."""
    packed = [linear for linear in linear_layers(model).values() if isinstance(linear, NF4Linear)]
    if not packed:
        return {"quantize": "none"}
    return {
        "quantize": min(quant_type(linear.layout) for linear in packed),
        "double_quant": all(linear.scales is not None for linear in packed),
        "block_size": max(linear.layout.block_size for linear in packed),
    }


def describe_in_words(quantization: Mapping[str, Any]) -> str:
    """Return a description by `describe_quantization` as text.

    >>> describe_in_words({"quantize": "nf4", "double_quant": True, "block_size": 128})
    'nf4 with double quantization in blocks of 128'
    """
    name = quantization["quantize"]
    if name == "none":
        return "not quantized"
    words = f"{name} {'with' if quantization.get('double_quant') else 'without'} double quantization"
    blocks = quantization.get("block_size")
    return words if blocks == BLOCK_SIZE else f"{words} in blocks of {blocks}"


def is_four_bit(source: Mapping[str, Any]) -> bool:
    """Return whether a config.json describes a 4-bit checkpoint of bitsandbytes."""
    entry = source.get("quantization_config")
    return (
        isinstance(entry, Mapping)
        and entry.get("quant_method", "bitsandbytes") == "bitsandbytes"
        and (entry.get("load_in_4bit") is True or entry.get("_load_in_4bit") is True)
    )
