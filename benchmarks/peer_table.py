"""What of other libraries is checked: a table of their callables, imported when they are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import peer_callables as layers
from benchmarks import peer_data as data
from benchmarks import peer_nf4 as nf4
from benchmarks import peer_training as training

KINDS = ("lora", "rslora", "dora", "merge", "merge_dora", "adapter_sum", "nf4", "double_quant", "linear4bit")
KINDS += ("loss_masking", "accumulation", "chat_mask", "adapter_directory")
MODULES = {  # distribution -> what must be importable
    "peft": "peft",
    "bitsandbytes": "bitsandbytes",
    "transformers": "transformers",
    "trl": "trl",
    "litgpt": "litgpt.lora",
    "torchtune": "torchtune.modules.peft",
    "torchao": "torchao",
}


@dataclass(frozen=True)
class Entry:
    """What of a peer is checked: `kind` as in `minilora.testing.laws`, and the cases that it is made for."""

    peer: str
    kind: str
    implementation: Any
    what: str  # is called
    note: str = ""
    only: Callable[[Any], bool] = lambda case: True


def in_float32(case: Any) -> bool:
    return case.dtype == "float32"


def without_bias(case: Any) -> bool:
    return not case.has_bias


def whole_blocks(case: Any) -> bool:
    return case.rows * case.columns % case.block_size == 0 and in_float32(case)


def whole_rows(case: Any) -> bool:
    return case.inner % 64 == 0 and in_float32(case)


FLOAT32 = "computes in float32, and is checked with float32 inputs alone"
ROUNDED = "rounds the weights to float32"
AO = "a format of its own: absmax is always quantized, to int8; levels have four digits"

PEERS = (
    Entry("peft", "lora", layers.peft_linear, "lora.Linear"),
    Entry("peft", "rslora", layers.peft_linear, "lora.Linear, use_rslora"),
    Entry(
        "peft",
        "dora",
        layers.peft_linear,
        "lora.Linear, use_dora",
        "of x (in) it makes y (1, out); dropout is applied to x in (m/‖W + s·B A‖ - 1)·W x, too",
    ),
    Entry("peft", "merge", layers.peft_merge, "merge"),
    Entry("peft", "merge_dora", layers.peft_merge, "merge, use_dora"),
    Entry(
        "peft",
        "adapter_sum",
        layers.peft_sum("cat"),
        'add_weighted_adapter, "cat"',
        'with one adapter "linear" is used, which ' + ROUNDED,
    ),
    Entry(
        "peft",
        "adapter_sum",
        layers.peft_sum("svd", svd_rank=layers.total_rank),
        'add_weighted_adapter, "svd"',
        "computes in float32",
    ),
    Entry(
        "peft",
        "adapter_sum",
        layers.peft_sum("linear"),
        'add_weighted_adapter, "linear"',
        f"{ROUNDED}; of several adapters it is (Σ √w·s B)(Σ √w·s A)",
    ),
    Entry("peft", "adapter_directory", data.peft_directory, "save_pretrained"),
    Entry("peft", "adapter_directory", partial(data.peft_directory, use_dora=True), "save_pretrained, use_dora"),
    Entry(
        "peft",
        "adapter_directory",
        partial(data.peft_directory, use_rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 16}),
        "save_pretrained, use_rslora and patterns",
    ),
    Entry("bitsandbytes", "nf4", (nf4.bitsandbytes_quantize, nf4.bitsandbytes_dequantize), "quantize_4bit"),
    Entry(
        "bitsandbytes",
        "nf4",
        (nf4.bitsandbytes_quantize, nf4.bitsandbytes_dequantize_flat),
        "quantize_4bit, dequantized as one row",
    ),
    Entry(
        "bitsandbytes",
        "double_quant",
        (nf4.bitsandbytes_double_quantize, nf4.bitsandbytes_double_dequantize),
        "quantize_4bit, compress_statistics",
    ),
    Entry("bitsandbytes", "linear4bit", nf4.bitsandbytes_linear, "Linear4bit"),
    Entry("transformers", "loss_masking", training.transformers_loss, "ForCausalLMLoss", FLOAT32, in_float32),
    Entry("transformers", "accumulation", training.transformers_accumulation, "Trainer.train", FLOAT32, in_float32),
    Entry("transformers", "chat_mask", data.transformers_mask, "apply_chat_template, ChatML"),
    Entry("trl", "loss_masking", training.trl_loss, "SFTTrainer.compute_loss", FLOAT32, in_float32),
    Entry("trl", "accumulation", training.trl_accumulation, "SFTTrainer.train", FLOAT32, in_float32),
    *(
        Entry("trl", "chat_mask", data.trl_mask(family), f"assistant_only_loss, {family}", note)
        for family, note in (
            ("llama3", ""),
            ("qwen2_5", "the newline after `assistant` is learned"),
            ("qwen3", "`<think>` and `</think>`, which are put in front of every reply, are learned"),
            ("gemma", "its template refuses a system message"),
            ("phi3", "its template writes an end of text after the last reply, which is learned, too"),
        )
    ),
    Entry("litgpt", "lora", layers.litgpt_linear, "LoRALinear"),
    Entry("litgpt", "merge", layers.litgpt_merge, "LoRALinear.merge"),
    Entry("litgpt", "loss_masking", training.litgpt_loss, "chunked_cross_entropy"),
    Entry("litgpt", "accumulation", training.litgpt_accumulation, "finetune.lora.fit", FLOAT32, in_float32),
    Entry("torchtune", "lora", layers.torchtune_linear, "LoRALinear"),
    Entry("torchtune", "dora", layers.torchtune_linear, "DoRALinear"),
    Entry("torchtune", "dora", layers.torchtune_linear, "DoRALinear, no bias", "", without_bias),
    Entry("torchtune", "merge", layers.torchtune_merge, "get_merged_lora_ckpt"),
    Entry("torchtune", "merge_dora", layers.torchtune_merge, "get_merged_lora_ckpt with magnitude"),
    Entry(
        "torchtune",
        "loss_masking",
        training.torchtune_loss,
        "lora_finetune_single_device._loss_step",
        FLOAT32,
        in_float32,
    ),
    Entry(
        "torchtune",
        "accumulation",
        training.torchtune_accumulation,
        "lora_finetune_single_device.train",
        f"{FLOAT32}; a label of a row's first token, which nothing predicts, is counted",
        in_float32,
    ),
    Entry("torchtune", "chat_mask", data.torchtune_mask, "OpenAIToMessages"),
    Entry("torchtune", "adapter_directory", data.torchtune_directory, "save_checkpoint"),
    Entry(
        "torchtune",
        "adapter_directory",
        partial(data.torchtune_directory, use_dora=True),
        "save_checkpoint, use_dora",
        'its adapter_config.json does not say `"use_dora": true`, so PEFT reads a LoRA and ignores the magnitudes',
    ),
    Entry(
        "torchao", "nf4", (nf4.torchao_quantize, nf4.torchao_dequantize), "NF4Tensor, whole blocks", AO, whole_blocks
    ),
    Entry("torchao", "linear4bit", nf4.torchao_linear, "linear_nf4, whole blocks", AO, whole_rows),
)
