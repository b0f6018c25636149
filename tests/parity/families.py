"""Tiny random models of transformers, one of every family that people adapt."""

import copy
from functools import cache

import pytest
import torch

from tests.models import DELTA

transformers = pytest.importorskip("transformers")


ENDS = {"bos_token_id": 1, "eos_token_id": 2}
SPECIAL = {"pad_token_id": 0, **ENDS}
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    **SPECIAL,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 4}
EXPERTS = {"moe_intermediate_size": 8, "num_experts_per_tok": 2}

GPT = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, **ENDS}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
WHISPER = {
    "vocab_size": 40,
    "d_model": 16,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")},
    "decoder_start_token_id": 1,
    **SPECIAL,
}
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4, "num_channels": 3}
CAUSAL, SEQUENCES = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
# config.model_type -> class, fields of the config
FAMILIES = {
    "bert": (SEQUENCES, SIZES),
    "bloom": (CAUSAL, {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "distilbert": (SEQUENCES, {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4}),
    "falcon": (CAUSAL, {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma": (CAUSAL, GROUPED),
    "gemma2": (CAUSAL, {**GROUPED, "sliding_window": 16, "query_pre_attn_scalar": 4}),
    "gemma3_text": (CAUSAL, {**GROUPED, "sliding_window": 16, "query_pre_attn_scalar": 4}),
    "granite": (CAUSAL, {**GROUPED, "embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    "gpt2": (CAUSAL, GPT),
    "gpt_neox": (CAUSAL, SIZES),
    "gptj": (CAUSAL, {**GPT, "rotary_dim": 4}),
    "lfm2": (CAUSAL, {**GROUPED, "block_multiple_of": 8, "full_attn_idxs": [1]}),
    "llama": (CAUSAL, GROUPED),
    "mamba": (CAUSAL, {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "ministral3": (CAUSAL, GROUPED),
    "mistral": (CAUSAL, {**GROUPED, "sliding_window": None}),
    "mixtral": (CAUSAL, {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "olmo2": (CAUSAL, GROUPED),
    "olmo3": (CAUSAL, GROUPED),
    "opt": (CAUSAL, {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "phi": (CAUSAL, GROUPED),
    "phi3": (CAUSAL, GROUPED),
    "qwen2": (CAUSAL, GROUPED),
    "qwen2_moe": (CAUSAL, {**GROUPED, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 12}),
    "qwen3": (CAUSAL, GROUPED),
    "qwen3_5_text": (CAUSAL, {**GROUPED, **DELTA}),
    "roberta": (SEQUENCES, SIZES),
    "smollm3": (CAUSAL, {**GROUPED, "use_sliding_window": False}),
    "t5": ("AutoModelForSeq2SeqLM", {**T5, "decoder_start_token_id": 0}),
    "vit": ("AutoModelForImageClassification", IMAGE),
    "whisper": ("AutoModelForSpeechSeq2Seq", WHISPER),
}


@cache
def _original(model_type, kind):
    config = transformers.AutoConfig.for_model(model_type, **FAMILIES[model_type][1])
    torch.manual_seed(0)
    return getattr(transformers, kind).from_config(config, dtype=torch.float32).eval()


def family_model(model_type, kind=None):
    """A model of the family in float32; `kind` is the class if it is not the family's usual one."""
    return copy.deepcopy(_original(model_type, kind or FAMILIES[model_type][0]))
