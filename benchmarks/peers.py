"""The peers' side of each work: one function a peer, all of the same signature; none of them imports minilora.

Their loops are what their own examples show, with their defaults wherever these are a matter of taste.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.process import Clock, Measurement, Peak
from benchmarks.work import IGNORE_INDEX, LEARNING_RATE, MAX_GRAD_NORM, Row, Task


def padded(rows: Sequence[Row], device: torch.device) -> dict[str, Tensor]:
    """A batch as transformers takes it, padded at the right to its longest row."""
    longest = max(len(tokens) for tokens, _ in rows)
    columns = {
        "input_ids": [tokens + [0] * (longest - len(tokens)) for tokens, _ in rows],
        "attention_mask": [[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in rows],
        "labels": [labels + [IGNORE_INDEX] * (longest - len(labels)) for _, labels in rows],
    }
    return {name: torch.tensor(column, device=device) for name, column in columns.items()}


def peft_model(task: Task) -> Any:
    """transformers' model with the adapter, as PEFT holds it: its adapters are float32 on any base.

    Of bitsandbytes' 4-bit models PEFT documents `prepare_model_for_kbit_training`, which makes the embedding, the head
    and the norms float32; that costs time and memory, so the base is taken as it is loaded.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    work, dtype = task.work, getattr(torch, task.work.dtype)
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantized = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype) if work.method == "qlora" else None
    base = AutoModelForCausalLM.from_pretrained(
        task.model, dtype=dtype, device_map={"": task.device}, quantization_config=quantized
    )
    base.config.use_cache = False
    if work.recompute:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return PeftModel.from_pretrained(base, task.adapter, is_trainable=True).train()


def train_peft(task: Task) -> Measurement:
    """PEFT and transformers in a plain loop: padded batches with their mask, the loss of the model, fused AdamW."""
    import peft  # noqa: F401  # the process as it is after the imports is where its memory begins
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.utils import logging

    device = torch.device(task.device)
    logging.disable_progress_bar()
    peak = Peak(device)
    model = peft_model(task)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    losses, norms, clock = [], [], Clock(device)
    for batch in task.batches:
        loss = model(**padded(batch, device)).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        clock.stop()
    return measured(task, clock, peak, {"loss": losses[0], "gradient norm": norms[0]})


def measured(task: Task, clock: Clock, peak: Peak, checks: dict[str, float]) -> Measurement:
    """A run of training, its warm-up left out; tokens are real ones, never pads."""
    tokens = [sum(len(tokens) for tokens, _ in batch) for batch in task.batches]
    return Measurement(clock.seconds[task.warm_up :], tokens[task.warm_up :], peak.read(), checks)
