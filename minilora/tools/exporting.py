"""Adapters written as another program takes them: its names, its scale, its matrices, its layout."""

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.adapter import PREFIX
from minilora.adapters.layers import LoraEmbedding
from minilora.adapters.layout import CONFIG_FILE, WEIGHTS_FILE, parse_tensor_name, read_adapter
from minilora.adapters.modules_to_save import TrainableTokens
from minilora.errors import TargetError, listed
from minilora.files import TensorFile, read_json, write_json, write_tensors
from minilora.lora import LoraLinear
from minilora.tools.readers import EMBEDDING, IGNORES, READERS, READS, REFUSES, SCALE_FIELDS, Base, reader_facts

Held = dict[str, dict[str, Tensor]]  # path in the text model -> key of `parse_tensor_name` -> tensor


def export_adapter(adapter: Path, directory: Path, title: str, out: Path) -> None:
    """Write an adapter of a model directory as the reader of this title takes it; both compute the same.

    Names are those of the reader. If it does not read a setting that the scale depends on, scales are folded into B.
    """
    stored, base, reader = read_adapter(adapter, is_for_text=True), Base.read(directory), READERS[title]
    config, held = stored.config(), {path: dict(part) for path, part in stored.tensors.items()}
    scales = {path: config.scale(path) for path, part in held.items() if "lora_A" in part}
    _fit_projections_(held, scales, base)
    values = {**stored.values, "r": config.r, "lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora}
    if scales and any(reader.ruling(row) != READS for row in SCALE_FIELDS):
        r = _fold_scales_(held, scales)
        values |= {"r": r, "lora_alpha": r, "use_rslora": False}

    def named(path: str) -> str:
        return base.names(path, reader)[0]

    out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / WEIGHTS_FILE, _peft_tensors(held, named), TensorFile(adapter / WEIGHTS_FILE).metadata)
    write_json(out / CONFIG_FILE, values | _named_settings(values, held, scales, named))
    facts = reader_facts(out, base, title)[title]
    if bad := {**facts[REFUSES], **facts[IGNORES]}:
        problems = [f"{name}: {why}" for name, why in bad.items()]
        raise TargetError(f"{adapter}: {reader.column} cannot take it:{listed(problems)}")
    if not reader.reads_peft:
        _write_mlx(out, base)


def _fold_scales_(held: Held, scales: dict[str, float]) -> int:
    """Fold the scales into B, pad A and B with zeros to one rank, and return it; with alpha = r, the scale is 1."""
    r = max(len(held[path]["lora_A"]) for path in scales)
    for path, scale in scales.items():
        lora_A, lora_B = held[path]["lora_A"], scale * held[path]["lora_B"].double()
        missing = r - len(lora_A)
        held[path] |= {"lora_A": F.pad(lora_A, (0, 0, 0, missing)), "lora_B": F.pad(lora_B, (0, missing)).float()}
        scales[path] = 1.0
    return r


def _named_settings(
    values: Mapping[str, Any], held: Held, scales: Mapping[str, float], named: Callable[[str], str]
) -> dict[str, Any]:
    """Return the settings that name modules."""
    ranks = {path: len(held[path]["lora_A"]) for path in scales}
    growth = {path: math.sqrt(r) if values["use_rslora"] else r for path, r in ranks.items()}  # scale = alpha / growth
    alphas = {path: s * growth[path] for path, s in scales.items() if s != values["lora_alpha"] / growth[path]}
    tokens = values.get("trainable_token_indices")
    return {
        "target_modules": sorted(map(named, scales)),
        **dict.fromkeys(("exclude_modules", "layers_pattern", "layers_to_transform")),  # not needed with paths
        "rank_pattern": {f"^{named(path)}": r for path, r in ranks.items() if r != values["r"]},
        "alpha_pattern": {f"^{named(path)}": alpha for path, alpha in alphas.items()},
        "modules_to_save": [named(name) for name in values.get("modules_to_save") or ()] or None,
        "trainable_token_indices": {named(k): v for k, v in tokens.items()} if isinstance(tokens, dict) else tokens,
    }


def _peft_tensors(held: Held, named: Callable[[str], str]) -> dict[str, Tensor]:
    """Return the tensors by their names in PEFT's layout."""
    tensors = {}
    for path, part in held.items():
        names = (LoraEmbedding if path == EMBEDDING else LoraLinear).PEFT_NAMES
        own = {**names, **TrainableTokens.PEFT_NAMES, "weight": "base_layer.weight"}
        for key, tensor in part.items():
            owner, _, end = (path, "", own[key]) if path else key.rpartition(".")
            tensors[f"{PREFIX}{named(owner)}.{end}"] = tensor
    return tensors


def _fit_projections_(held: Held, scales: dict[str, float], base: Base) -> None:
    """Split updates of matrices that the base has in parts, and fuse those of parts that it has in one matrix.

    What is more than an update, or of another size, is left, and then refused by its name.
    """
    counts = [base.config.get(f"num_{kind}_heads") for kind in ("attention", "key_value")]
    heads, *_, kv_heads = [n for n in counts if isinstance(n, int) and n > 0] * 2 or (1, 1)
    plain = {path for path in scales if held[path].keys() == {"lora_A", "lora_B"} and path not in base.modules}
    for parent, (name, shares) in itertools.product(
        {path.rpartition(".")[0] for path in plain},
        {"qkv_proj": {"q": heads, "k": kv_heads, "v": kv_heads}, "gate_up_proj": {"gate": 1, "up": 1}}.items(),
    ):
        whole, parts = f"{parent}.{name}", [f"{parent}.{part}_proj" for part in shares]
        if whole in base.modules:
            rows, found = sum(base.modules[whole][:1]), plain.intersection(parts)
            sizes = {path: rows * n // sum(shares.values()) for path, n in zip(parts, shares.values(), strict=True)}
            if found and all(len(held[path]["lora_B"]) == sizes[path] for path in found):
                blocks = [held[p]["lora_B"] * scales.pop(p) if p in found else torch.zeros(sizes[p], 0) for p in parts]
                lora_A = torch.cat([held.pop(path)["lora_A"] for path in parts if path in found])
                held[whole], scales[whole] = {"lora_A": lora_A, "lora_B": torch.block_diag(*blocks)}, 1.0
        elif whole in plain:
            rows_of = [sum(base.modules.get(path, ())[:1]) for path in parts]
            if sum(rows_of) == len(held[whole]["lora_B"]):
                update = held.pop(whole)
                for path, lora_B in zip(parts, update["lora_B"].split(rows_of), strict=True):
                    held[path] = {"lora_A": update["lora_A"], "lora_B": lora_B}
                scales |= dict.fromkeys(parts, scales.pop(whole))


def _write_mlx(out: Path, base: Base) -> None:
    """Replace files in PEFT's layout with those of mlx-lm, whose A and B are transposed; scales are folded."""
    file, values = TensorFile(out / WEIGHTS_FILE), read_json(out / CONFIG_FILE)
    tensors, keys = {}, {"lora_A": "lora_a", "lora_B": "lora_b", "magnitude": "m"}
    for name in file.shapes:
        path, key = parse_tensor_name(name)
        if key in keys:
            tensors[f"{path}.{keys[key]}"] = file.read(name).t()
    write_tensors(out / "adapters.safetensors", tensors)
    parameters = {"rank": values["r"], "scale": 1.0, "dropout": 0.0, "keys": values["target_modules"]}
    kind, layers = "dora" if values.get("use_dora") else "lora", base.config.get("num_hidden_layers")
    write_json(out / CONFIG_FILE, {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters})
    (out / WEIGHTS_FILE).unlink()
