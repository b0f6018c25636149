"""The names of flags in other tools, and what is meant by a name that is no flag."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from minilora.errors import in_recipe

# Flags, and their names in PEFT, TRL, torchtune, litgpt, mlx-lm, axolotl and LLaMA-Factory where these are not similar.
NAMES_ELSEWHERE = {
    "lora_r": "r rank",
    "target_modules": "lora_target lora_target_linear",
    "model": "model_name_or_path checkpoint_dir",
    "data": "dataset_name train_file",
    "eval_data": "valid_data validation_file eval_dataset",
    "out": "output_dir adapter_path save_path",
    "learning_rate": "lr",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "accumulate_grad_batches grad_accum gradient_accumulation",
    "max_length": "cutoff_len sequence_len",
    "epochs": "num_train_epochs",
    "max_steps": "iters",
    "train_on": "completion_only_loss assistant_only_loss mask_prompt",
    "gradient_checkpointing": "recompute grad_checkpoint enable_activation_checkpointing",
    "batch_tokens": "packing sample_packing packed",
    "prompt_style": "template chat_template",
    "report": "logger_name",
    "resume": "resume_from_checkpoint",
    "adapter": "resume_adapter_file adapter_name_or_path lora_model_dir",
    "eval_steps": "steps_per_eval",
    "eval_split": "val_set_size val_size",
    "logging_steps": "steps_per_report log_interval",
    "temperature": "temp",
    "double_quant": "use_bnb_nested_quant",
}
ELSEWHERE = {name: flag for flag, names in NAMES_ELSEWHERE.items() for name in names.split()}
ADVICE = {  # for flags of these tools that have no counterpart among the flags
    **dict.fromkeys(("bf16", "fp16", "precision"), "use --dtype float32 or bfloat16"),
    **dict.fromkeys(("load_in_4bit", "quantization", "quantization_bit"), "use --quantize nf4"),
    **dict.fromkeys(("optim", "optimizer"), "there is none: the optimizer is AdamW"),
    **dict.fromkeys(("wandb", "wandb_project"), "use --report wandb"),
    **dict.fromkeys(("deepspeed", "fsdp"), "there is none; use torchrun --nproc-per-node N -m minilora finetune"),
    **dict.fromkeys(("task", "task_type"), in_recipe("classify_texts")),
    **dict.fromkeys(("density", "majority_sign_method"), in_recipe("ties_and_dare")),
    "target_parameters": in_recipe("experts"),
    **dict.fromkeys(("group_by_length", "train_sampling_strategy", "sort_window"), "there is none: nothing is padded"),
    "compile": "there is none: compiling did not make a step faster",
    "push_to_hub": "use `minilora push DIR NAME`",
}


def nearest(name: str, known: Collection[str]) -> str:
    """Return the end of a message about an unknown flag or key: what was probably meant, also in other tools."""
    key = name.lstrip("-").replace("-", "_")
    if key in ADVICE:
        return f"; {ADVICE[key]}"
    meant = ELSEWHERE.get(key)
    if meant not in known:
        meant = next(iter(difflib.get_close_matches(key, known, n=1)), None)
    if meant is None:
        return ""
    return f"; did you mean {meant!r}?" if not name.startswith("-") else f"; did you mean --{meant.replace('_', '-')}?"
