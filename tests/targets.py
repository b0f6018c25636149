"""What to adapt in the models of usual architectures: what `find_target_modules` is compared with."""

from collections.abc import Mapping
from typing import NamedTuple


class Targets(NamedTuple):
    """What to adapt in the models of an architecture.

    Attributes:
        linears: `target_modules`, all linears of attention and MLP.
        leave: linears that fused kernels read without calling them, so that an adapter would do nothing.
    """

    linears: tuple[str, ...]
    leave: tuple[str, ...] = ()


def _of(linears: str, leave: str = "") -> Targets:
    return Targets(tuple(linears.split()), tuple(leave.split()))


_ATTENTION = "q_proj k_proj v_proj o_proj"
_LLAMA = f"{_ATTENTION} gate_proj up_proj down_proj"
_BERT = "query key value intermediate.dense output.dense"  # output.dense is also the end of attention.output.dense
_NEOX = "query_key_value dense dense_h_to_4h dense_4h_to_h"
_BART = "q_proj k_proj v_proj out_proj fc1 fc2"

TARGETS: Mapping[str, Targets] = {  # by `model_type` of config.json; modules are called as in transformers 5
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2"), _of(_LLAMA)),
    **dict.fromkeys(("ministral3", "olmo3", "qwen2", "qwen3", "smollm3"), _of(_LLAMA)),
    **dict.fromkeys(("bert", "roberta"), _of(_BERT)),
    **dict.fromkeys(("bloom", "falcon", "gpt_neox"), _of(_NEOX)),
    **dict.fromkeys(("opt", "whisper"), _of(_BART)),
    "distilbert": _of("q_lin k_lin v_lin out_lin lin1 lin2"),
    "gpt2": _of("c_attn c_proj c_fc"),
    "gptj": _of("q_proj k_proj v_proj out_proj fc_in fc_out"),
    "lfm2": _of("q_proj k_proj v_proj out_proj in_proj w1 w2 w3"),
    "mamba": _of("in_proj", leave="x_proj dt_proj out_proj"),
    "mixtral": _of(_ATTENTION),
    "phi": _of("q_proj k_proj v_proj dense fc1 fc2"),
    "phi3": _of("qkv_proj o_proj gate_up_proj down_proj"),
    "qwen2_moe": _of(f"{_LLAMA} shared_expert_gate"),
    "qwen3_5_text": _of(f"{_LLAMA} in_proj_qkv in_proj_z in_proj_b in_proj_a out_proj"),
    "t5": _of("q k v o wi wo"),
    "vit": _of("q_proj k_proj v_proj o_proj fc1 fc2"),
}
