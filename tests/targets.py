"""What to adapt in the models of usual architectures: what `find_target_modules` is compared with."""

from collections.abc import Mapping
from typing import NamedTuple


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
