"""What of other libraries is checked: a table of their callables, imported when they are called, and a judgement.

A law that fails does not say whether a library is wrong: `JUDGED` does. What it does not name is wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import peer_callables as layers
from benchmarks import peer_data as data
from benchmarks import peer_nf4 as nf4
from benchmarks import peer_sequences as rows
from benchmarks import peer_training as training

MODULES = {  # distribution -> what must be importable
    "peft": "peft",
    "bitsandbytes": "bitsandbytes",
    "transformers": "transformers",
    "trl": "trl",
    "litgpt": "litgpt.lora",
    "torchtune": "torchtune.modules.peft",
    "axolotl": "axolotl.utils.collators",
    "mlx-lm": "mlx_lm.tuner.trainer",
    "llamafactory": "llamafactory.data.template",
}
BUILT = ("packing", "generation", "step")  # kinds whose entries are functions that make what is checked


@dataclass(frozen=True)
class Entry:
    """What of a peer is checked: `kind` as in `minilora.testing.laws` or "step", and the cases that it is made for."""

    peer: str
    kind: str
    implementation: Any
    what: str  # is called
    only: Callable[[Any], bool] = lambda case: True


def in_float32(case: Any) -> bool:
    return case.dtype == "float32"


oss: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 2, "num_experts_per_tok": 1}
oss["layer_types"] = ["full_attention"] * 2
recurrent = {"num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 8}  # the third layer has attention
gemma = partial(rows.transformers_generation, "recurrent_gemma", **recurrent)
mamba = partial(rows.transformers_packing, "mamba", has_index=True, state_size=4)
bfd = {"packing": True, "packing_strategy": "bfd"}
wrapped = {"packing": True, "packing_strategy": "wrapped"}
FAMILIES = ("llama3", "qwen2_5", "qwen3", "gemma", "phi3")
both = ["embed_tokens", "lm_head"]
flat = (nf4.bitsandbytes_quantize, nf4.bitsandbytes_dequantize_flat)
PEERS = (
    Entry("peft", "lora", layers.peft_linear, "LoRA"),
    Entry("peft", "rslora", layers.peft_linear, "rsLoRA"),
    Entry("peft", "dora", layers.peft_linear, "DoRA"),
    Entry("peft", "merge", layers.peft_merge, "merge"),
    Entry("peft", "merge_dora", layers.peft_merge, "merge of DoRA"),
    Entry("peft", "adapter_sum", layers.peft_sum, "`add_weighted_adapter`"),
    Entry("peft", "adapter_directory", data.peft_directory, "files"),
    Entry("peft", "adapter_directory", partial(data.peft_directory, use_dora=True), "files of DoRA"),
    Entry("peft", "step", partial(rows.peft_step, target_modules="all-linear"), "step"),
    Entry("peft", "step", partial(rows.peft_step, target_modules="all-linear", use_dora=True), "step of DoRA"),
    Entry("peft", "step", partial(rows.peft_step, True, target_modules=both), "step of tied embeddings"),
    Entry("bitsandbytes", "nf4", (flat[0], nf4.bitsandbytes_dequantize), "NF4"),
    Entry("bitsandbytes", "nf4", flat, "NF4 as one row"),
    Entry("bitsandbytes", "linear4bit", nf4.bitsandbytes_linear, "`Linear4bit`"),
    Entry("transformers", "loss_masking", training.transformers_loss, "loss", in_float32),
    Entry("transformers", "accumulation", training.transformers_accumulation, "`Trainer`", in_float32),
    Entry("transformers", "packing", partial(rows.transformers_packing, "llama"), "packed Llama"),
    Entry("transformers", "packing", partial(rows.transformers_packing, "gpt_oss", **oss), "packed gpt-oss"),
    Entry("transformers", "packing", mamba, "packed Mamba"),
    Entry("transformers", "packing", partial(rows.transformers_packing, "llama", use_cache=True), "packed, cached"),
    Entry("transformers", "generation", partial(rows.transformers_generation, "llama"), "`generate`"),
    Entry("transformers", "generation", gemma, "`generate` of RecurrentGemma"),
    Entry("trl", "loss_masking", training.trl_loss, "loss", in_float32),
    Entry("trl", "accumulation", training.trl_accumulation, "`SFTTrainer`", in_float32),
    Entry("trl", "packing", partial(rows.trl_packing, "sdpa"), "padding"),
    Entry("trl", "packing", partial(rows.trl_packing, "sdpa", **bfd), "packing"),
    Entry("trl", "packing", partial(rows.trl_packing, "sdpa", **wrapped), "packing, wrapped"),
    *(Entry("trl", "chat_mask", data.trl_mask(family), f"mask of {family}") for family in FAMILIES),
    Entry("trl", "chat_tools", data.trl_mask("qwen3"), "tools of qwen3"),
    Entry("trl", "chat_tools", data.trl_mask("llama3"), "tools of llama3"),
    Entry("litgpt", "lora", layers.litgpt_linear, "LoRA"),
    Entry("litgpt", "merge", layers.litgpt_merge, "merge"),
    Entry("litgpt", "loss_masking", training.litgpt_loss, "loss"),
    Entry("litgpt", "accumulation", training.litgpt_accumulation, "`finetune.lora.fit`", in_float32),
    Entry("torchtune", "lora", layers.torchtune_linear, "LoRA"),
    Entry("torchtune", "dora", layers.torchtune_linear, "DoRA"),
    Entry("torchtune", "merge", layers.torchtune_merge, "merge"),
    Entry("torchtune", "merge_dora", layers.torchtune_merge, "merge of DoRA"),
    Entry("torchtune", "accumulation", training.torchtune_accumulation, "the recipe's loop", in_float32),
    Entry("axolotl", "packing", partial(rows.axolotl_packing, False), "packed logits"),
    Entry("axolotl", "packing", partial(rows.axolotl_packing, True), "packed loss"),
    Entry("axolotl", "chat_mask", data.axolotl_mask("chatml", "<|im_end|>"), "mask of chatml"),
    Entry("axolotl", "chat_tools", data.axolotl_mask("qwen_25", "<|im_end|>"), "tools of qwen_25"),
    Entry("mlx-lm", "packing", rows.mlx_packing, "`default_loss`"),
    Entry("llamafactory", "chat_mask", data.llamafactory_mask("llama3"), "mask of llama3"),
    Entry("llamafactory", "chat_tools", data.llamafactory_mask("llama3"), "tools of llama3"),
    Entry("llamafactory", "chat_mask", data.llamafactory_mask("qwen3"), "mask of qwen3"),
    Entry("llamafactory", "chat_tools", data.llamafactory_mask("qwen3"), "tools of qwen3"),
)
LESS, OTHER = "less precise", "another convention"
JUDGED = {  # "peer what" -> the verdict, and what is found; what is wrong has a page in docs/findings
    "peft DoRA": (OTHER, "`(in)` gives `(1, out)`; dropout is applied in the base's term, too"),
    "peft `add_weighted_adapter`": (LESS, "float64 is rounded to float32"),
    "trl packing, wrapped": (OTHER, "documents are joined and cut, as its page says"),
    "trl mask of qwen2_5": (OTHER, "the newline after `assistant` is learned"),
    "trl mask of qwen3": (OTHER, "an empty `<think>` block is put before replies and learned"),
    "trl mask of gemma": (OTHER, "the template refuses system messages"),
    "trl mask of phi3": (OTHER, "an end of text after the last reply is learned"),
    "trl tools of llama3": (OTHER, "the model's own template has no tools"),
    "llamafactory mask of qwen3": (OTHER, "an empty `<think>` block is put before replies and learned"),
}
