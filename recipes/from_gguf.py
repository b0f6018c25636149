"""Convert a GGUF file of llama.cpp into a model directory: weights in bfloat16, config.json and the tokenizer.

    python recipes/from_gguf.py FILE DIRECTORY

The package `gguf` dequantizes the tensors and knows their names. The values of two kinds differ: llama.cpp rotates rows
of q and k in pairs of neighbors, transformers in pairs half a head apart; and llama.cpp stores Gemma's norms as 1 + w.
A key or tensor that is not known here is an error. `gguf_tokenizer.py` makes the files of the tokenizer.
"""

import json
import sys
from pathlib import Path

import gguf
import torch
from gguf_tokenizer import save_tokenizer
from safetensors.torch import save_file

import minilora as ml
from minilora.llama import llama3_frequencies, rope_frequencies

MODELS = {n.lower(): n for n in ("Gemma3", "Llama", "Olmo2", "Qwen2", "Qwen3", "SmolLM3")}
KEYS = """
    attention.layer_norm_rms_epsilon:rms_norm_eps attention.head_count_kv:num_key_value_heads
    attention.head_count:num_attention_heads attention.sliding_window:sliding_window
    rope.freq_base_swa:rope_local_base_freq context_length:max_position_embeddings feed_forward_length:intermediate_size
    block_count:num_hidden_layers attention.key_length:head_dim embedding_length:hidden_size rope.freq_base:rope_theta
"""
IMPLIED = ("vocab_size", "attention.value_length", "rope.dimension_count", "rope.scaling.original_context_length")
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
NORMS = "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm"
ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj self_attn.q_norm self_attn.k_norm"
LLAMA = f"{NORMS} {ATTENTION} mlp.gate_proj mlp.up_proj mlp.down_proj"


def require(is_known: bool, what: str) -> None:
    if not is_known:
        raise ml.FormatError(f"this recipe cannot use {what}")


def build_config(family: str, keys: dict, tensors: dict) -> dict:
    """Return the config.json of a file; take out the tensor of Llama 3's rotation, which config.json describes."""
    keys = {name.removeprefix(f"{family}."): value for name, value in keys.items() if name.startswith(f"{family}.")}
    names = dict(pair.split(":") for pair in KEYS.split())
    require(keys.keys() <= {*names, *IMPLIED}, f"the keys {sorted(keys.keys() - {*names, *IMPLIED})}")
    config = {names[name]: value for name, value in keys.items() if name in names} | {"dtype": "bfloat16"}
    config |= {"model_type": family.replace("gemma3", "gemma3_text"), "architectures": [f"{MODELS[family]}ForCausalLM"]}
    config |= {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    config["vocab_size"] = len(tensors["token_embd.weight"].data)
    config["tie_word_embeddings"] = "output.weight" not in tensors
    width = config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    require((family, config["num_hidden_layers"]) != ("gemma3", 62), "Gemma 3 27B: its scale of q is not in the file")
    config["partial_rotary_factor"] = keys.get("rope.dimension_count", width) / width
    if factors := tensors.pop("rope_freqs.weight", None):
        config["rope_scaling"] = scaling = {**LLAMA3, "factor": float(factors.data.max())}
        llama3 = llama3_frequencies(width, config["rope_theta"], scaling) * torch.tensor(factors.data)
        is_llama3 = torch.allclose(llama3, rope_frequencies(width, config["rope_theta"]))
        require(is_llama3, "rope_freqs.weight, which is not the rotation of Llama 3.1 or 3.2")
    return config


def read_weights(family: str, tensors: dict, config: dict) -> dict:
    """Return the weights by transformers' names, in bfloat16."""
    paths = [f"model.layers.{i}.{module}" for i in range(config["num_hidden_layers"]) for module in LLAMA.split()]
    paths += ["model.embed_tokens", "model.norm", "lm_head"]
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config["num_hidden_layers"])
    ours = {f"{theirs.get_name(path)}.{kind}": f"{path}.{kind}" for path in paths for kind in ("weight", "bias")}
    require(tensors.keys() <= ours.keys(), f"the tensors {sorted(tensors.keys() - ours.keys())[:5]}")
    weights = {}
    for name, tensor in tensors.items():
        weight = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        if family in ("llama", "smollm3") and (".attn_q." in name or ".attn_k." in name):
            weight = weight.unflatten(0, (-1, config["head_dim"] // 2, 2)).transpose(1, 2).flatten(0, 2)
        if family == "gemma3" and name.endswith("norm.weight"):
            weight = weight - 1
        weights[ours[name]] = weight.bfloat16()
    return weights


if __name__ == "__main__":
    reader, directory = gguf.GGUFReader(sys.argv[1]), Path(sys.argv[2])
    require(not directory.exists(), f"{directory}, which is there already")
    keys = {name: field.contents() for name, field in reader.fields.items()}
    family = keys["general.architecture"]
    require(family in MODELS, f"the architecture {family!r}; it can read {[*MODELS]}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = build_config(family, keys, tensors) | {"eos_token_id": keys.get("tokenizer.ggml.eos_token_id")}
    weights = read_weights(family, tensors, config)
    save_tokenizer(keys, directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
