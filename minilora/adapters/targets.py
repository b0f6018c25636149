"""Which modules to adapt: `find_target_modules` inspects a model, and `TARGETS` lists them for usual architectures.

LoRA on all linears of the attention and the MLP learns what LoRA on the attention alone does not, also with as many
numbers to train [QLoRA §4, Schulman]; so these are what the field adapts. PEFT's own defaults are older and fewer.

    [QLoRA]     Dettmers et al. 2023, QLoRA: Efficient Finetuning of Quantized LLMs
    [Schulman]  Schulman and Thinking Machines 2025, LoRA Without Regret
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import nn

from minilora.adapter import base_modules
from minilora.adapters.parts import LINEARS, is_read_by_kernels, kind_of
from minilora.errors import TargetError, check_types


class Targets(NamedTuple):
    """What to adapt in the models of an architecture.

    Attributes:
        linears: `target_modules`, all linears of attention and MLP.
        peft: what PEFT takes if nothing is said; () if it then refuses.
        parameters: `target_parameters` for the experts of a mixture, which are no linears.
        leave: linears of the layers that are better left alone; `find_target_modules` says why.
    """

    linears: tuple[str, ...]
    peft: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()


def _of(linears: str, peft: str = "", parameters: str = "", leave: str = "") -> Targets:
    return Targets(*(tuple(names.split()) for names in (linears, peft, parameters, leave)))


_ATTENTION, _EXPERTS = "q_proj k_proj v_proj o_proj", "experts.gate_up_proj experts.down_proj"
_LLAMA = f"{_ATTENTION} gate_proj up_proj down_proj"
_BERT = "query key value intermediate.dense output.dense"  # output.dense is also the end of attention.output.dense
_NEOX = "query_key_value dense dense_h_to_4h dense_4h_to_h"
_BART = "q_proj k_proj v_proj out_proj fc1 fc2"

TARGETS: Mapping[str, Targets] = {  # by `model_type` of config.json; modules are called as in transformers 5
    "bert": _of(_BERT, "query value"),
    "bloom": _of(_NEOX, "query_key_value"),
    "distilbert": _of("q_lin k_lin v_lin out_lin lin1 lin2"),
    "falcon": _of(_NEOX, "query_key_value"),
    "gemma": _of(_LLAMA, "q_proj v_proj"),
    "gemma2": _of(_LLAMA, "q_proj v_proj"),
    "gemma3_text": _of(_LLAMA, "q_proj v_proj"),
    "gpt2": _of("c_attn c_proj c_fc", "c_attn"),
    "gpt_neox": _of(_NEOX, "query_key_value"),
    "gptj": _of("q_proj k_proj v_proj out_proj fc_in fc_out", "q_proj v_proj"),
    "llama": _of(_LLAMA, "q_proj v_proj"),
    "mamba": _of("in_proj", leave="x_proj dt_proj out_proj"),
    "mistral": _of(_LLAMA, "q_proj v_proj"),
    "mixtral": _of(_ATTENTION, "q_proj v_proj", parameters=_EXPERTS),
    "opt": _of(_BART, "q_proj v_proj"),
    "phi": _of("q_proj k_proj v_proj dense fc1 fc2", "q_proj v_proj fc1 fc2"),
    "phi3": _of("qkv_proj o_proj gate_up_proj down_proj"),
    "qwen2": _of(_LLAMA, "q_proj v_proj"),
    "qwen2_moe": _of(_LLAMA, parameters=_EXPERTS, leave="shared_expert_gate"),
    "qwen3": _of(_LLAMA, "q_proj v_proj"),
    "roberta": _of(_BERT, "query value"),
    "smollm3": _of(_LLAMA),
    "t5": _of("q k v o wi wo", "q v"),
    "vit": _of("q_proj k_proj v_proj o_proj fc1 fc2"),
    "whisper": _of(_BART),
}


def find_target_modules(model: nn.Module) -> list[str]:
    """Return the shortest `target_modules` that match all linears in a model's layers, and nothing else.

    A layer has a number in its path, as "3" in "model.layers.3.mlp.up_proj". Modules outside layers, such as heads and
    poolers, are left out, and of those in the layers

    - the routers of a mixture of experts: a small change there sends tokens to experts that have not learned them;
    - all of a Mamba mixer but its `in_proj`: fused kernels read the other weights without calling their modules, and an
      adapter there would do nothing.

    Raises:
        TargetError: there are no such linears.
    """
    check_types(find_target_modules, locals())
    modules = base_modules(model)
    chosen = {
        path
        for path, module in modules.items()
        if kind_of(module) in LINEARS and _is_in_layer(path) and not _is_router(path, modules)
        if not is_read_by_kernels(path, modules)
    }
    if not chosen:
        raise TargetError("the model has no linears in numbered layers; name what to adapt in target_modules")
    return _shortest_names(chosen, modules.keys() - chosen)


def _is_in_layer(path: str) -> bool:
    return any(part.isdecimal() for part in path.split(".")[:-1])


def _is_router(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a linear stands beside a module `experts` or belongs to a router."""
    parts = path.split(".")
    return "router" in parts or ".".join([*parts[:-1], "experts"]) in modules


def _shortest_names(chosen: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return the shortest endings of the chosen paths with which no other path ends."""
    taken = {end for path in others for end in _ends(path)}
    return sorted({next((end for end in _ends(path) if end not in taken), path) for path in chosen})


def _ends(path: str) -> Iterator[str]:
    """Yield the endings of a path that start with a word, as "mlp.0" and "h.2.mlp.0" of "h.2.mlp.0"."""
    parts = path.split(".")
    return (".".join(parts[at:]) for at in reversed(range(len(parts))) if not parts[at].isdecimal())
