"""Which tools read a model or an adapter, and why one does not: what is known of their rules, the tools not asked.

PEFT    since 0.14, keys of a config that it does not know are left out; before, they were an error
vLLM    A and B of linears and one scale for all of them, alpha / r or alpha / √r
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minilora.lora.files import BASE_COPY, PLAIN_INITS, PREFIX
from minilora.lora.functional import lora_scale

# Keys whose adapters are more than s·B A on a linear; of the first, B A is not even the shape of the change.
RESHAPED = ("target_parameters", "use_qalora", "use_bdlora", "kasa_config")
VARIANTS = (
    *RESHAPED,
    *("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "alora_invocation_tokens"),
    *("arrow_config", "monteclora_config", "layer_replication"),
)
PEFT_SINCE = {  # minor version of PEFT 0 that first knows a key without which the adapter is another
    "trainable_token_indices": 15,
    "use_qalora": 16,
    "target_parameters": 17,
    "alora_invocation_tokens": 18,
    "arrow_config": 18,
    "use_bdlora": 19,
    "monteclora_config": 20,
    "kasa_config": 21,
}
VLLM_RANK = 16  # the highest rank that vLLM takes unless told


@dataclass(frozen=True)
class Reader:
    """Whether a tool reads a file, and on what condition it does or for what reasons it does not."""

    tool: str
    reads: bool
    reasons: tuple[str, ...]


def model_readers(
    source: Mapping[str, Any], formats: Sequence[str | None], problems: Sequence[str]
) -> tuple[Reader, ...]:
    """`formats` is what the files' metadata say of "format"; `problems` are minilora's own."""
    theirs = []
    if not isinstance(source.get("model_type"), str):
        theirs.append("config.json has no model_type")
    if None in formats:
        theirs.append('the metadata of a file has no "format"')
    condition = ("its own code is needed: trust_remote_code",) if source.get("auto_map") else ()
    return (
        Reader("minilora", not problems, tuple(problems)),
        Reader("transformers", not theirs, tuple(theirs) or condition),
    )


def adapter_readers(
    values: Mapping[str, Any],
    names: Sequence[str],
    ranks: Mapping[str, int],
    declared: Mapping[str, int],
    scales: Mapping[str, float | None],
    problems: Sequence[str],
) -> tuple[Reader, ...]:
    """Who reads an adapter.

    Args:
        values: what its config says.
        names: of its tensors.
        ranks: module -> rank by its tensors.
        declared: module -> rank by the config, where known.
        scales: module -> s, None where unknown.
        problems: why minilora does not read it.
    """
    return (
        Reader("minilora", not problems, tuple(problems)),
        _peft(values, names, ranks, declared),
        _vllm(values, names, ranks, scales),
    )


def _peft(
    values: Mapping[str, Any], names: Sequence[str], ranks: Mapping[str, int], declared: Mapping[str, int]
) -> Reader:
    reasons = []
    if not isinstance(values.get("peft_type"), str):
        reasons.append("adapter_config.json has no peft_type")
    if odd := [name for name in names if not name.startswith(PREFIX)]:
        reasons.append(f"{odd[0]} does not begin with {PREFIX}")
    if not values.get("target_modules") and not values.get("target_parameters"):
        reasons.append("target_modules is empty")
    is_reshaped = any(values.get(key) for key in RESHAPED)
    if wrong := [module for module in declared if declared[module] != ranks[module] and not is_reshaped]:
        reasons.append(f"{wrong[0]} has rank {ranks[wrong[0]]}, by the config {declared[wrong[0]]}")
    since = max([14, *(minor for key, minor in PEFT_SINCE.items() if values.get(key))])
    return Reader("PEFT", not reasons, tuple(reasons) or (f"0.{since} or later",))


def _vllm(
    values: Mapping[str, Any], names: Sequence[str], ranks: Mapping[str, int], scales: Mapping[str, float | None]
) -> Reader:
    reasons = [f"{key} is set" for key in VARIANTS if values.get(key)]
    if values.get("bias", "none") != "none":
        reasons.append(f"bias is {values['bias']!r}")
    if values.get("peft_type") != "LORA":
        reasons.append(f"peft_type is {values.get('peft_type')!r}")
    if values.get("init_lora_weights", True) not in PLAIN_INITS:
        reasons.append(f"init_lora_weights is {values['init_lora_weights']!r}: the base's weights are changed")
    r, lora_alpha = values.get("r"), values.get("lora_alpha")
    if not isinstance(r, int) or not isinstance(lora_alpha, int | float) or not r > 0:
        reasons.append(f"r is {r!r} and lora_alpha is {lora_alpha!r}")
    elif any(scale != lora_scale(r, lora_alpha, bool(values.get("use_rslora"))) for scale in scales.values()):
        reasons.append("a module has another scale than lora_alpha and r give")
    plain = rf"{re.escape(PREFIX)}.+\.(lora_[AB]\.weight)|{BASE_COPY}"
    if odd := [name for name in names if not re.fullmatch(plain, name)]:
        reasons.append(f"{odd[0]} is not the A or B of a linear")
    highest = max(ranks.values(), default=0)
    condition = (f"--max-lora-rank {highest} or more",) if highest > VLLM_RANK else ()
    return Reader("vLLM", not reasons, tuple(reasons) or condition)
