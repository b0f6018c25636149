"""Which tools read a model or an adapter: why one does not, as far as the files show it. No tool is asked but minilora.

PEFT    each tensor under its prefix, and of the rank that the config gives
vLLM    A and B of linears, and one scale for all of them, alpha / r or alpha / √r
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from minilora.errors import MiniloraError
from minilora.lora.config import LoraConfig
from minilora.lora.files import BASE_COPY, PLAIN_INITS, PREFIX, is_name
from minilora.lora.functional import lora_scale

PLAIN = rf"{re.escape(PREFIX)}.+\.lora_[AB]\.weight|{BASE_COPY}"


def minilora_problems(read: Callable[[], object]) -> list[str]:
    """What minilora says when it tries."""
    try:
        read()
    except MiniloraError as error:
        first, *details = (line.strip() for line in str(error).splitlines())
        return details or [first]
    return []


def transformers_problems(config: Mapping[str, Any], metadata: Iterable[Mapping[str, str]]) -> list[str]:
    problems = [] if isinstance(config.get("model_type"), str) else ["config.json has no model_type"]
    return problems + ['the metadata of a file has no "format"'] * any("format" not in found for found in metadata)


def peft_problems(
    values: Mapping[str, Any], config: LoraConfig | None, names: Iterable[str], ranks: Mapping[str, int]
) -> list[str]:
    """`config` is what the values say, None where that is unknown; `ranks` are those of the tensors (module -> r)."""
    problems = [] if isinstance(values.get("peft_type"), str) else ["adapter_config.json has no peft_type"]
    problems += [f"{name} does not begin with {PREFIX}" for name in names if not name.startswith(PREFIX)][:1]
    if config is not None and all(map(is_name, values.get("rank_pattern") or {})):
        wrong = [
            f"{at} has rank {r}, by the config {config.rank(at)}" for at, r in ranks.items() if config.rank(at) != r
        ]
        problems += wrong[:1]
    return problems


def vllm_problems(
    values: Mapping[str, Any], config: LoraConfig | None, names: Iterable[str], scales: Iterable[float | None]
) -> list[str]:
    """`scales` are those of the modules, None where unknown."""
    problems = [f"{key} is set" for key in ("use_dora", "modules_to_save") if values.get(key)]
    if values.get("bias", "none") != "none":
        problems.append(f"bias is {values['bias']!r}")
    if values.get("peft_type") != "LORA":
        problems.append(f"peft_type is {values.get('peft_type')!r}")
    if values.get("init_lora_weights", True) not in PLAIN_INITS:
        problems.append(f"init_lora_weights is {values['init_lora_weights']!r}, which changes the base's weights")
    only = lora_scale(config.r, config.lora_alpha, config.use_rslora) if config is not None else None
    if only is None or any(scale != only for scale in scales):
        problems.append("a module has another scale than lora_alpha and r give")
    return problems + [f"{name} is not the A or B of a linear" for name in names if not re.fullmatch(PLAIN, name)][:1]
