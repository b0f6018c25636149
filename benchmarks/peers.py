"""The peers' side of each work: one function a peer, all of the same signature; none of them imports minilora.

Their loops are what their own examples show, with their defaults wherever these are a matter of taste.
"""

import importlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.process import Clock, Measurement, Peak, first_and_last
from benchmarks.work import ANSWERED, IGNORE_INDEX, LEARNING_RATE, MAX_GRAD_NORM, Row, Task, config_of


def padded(rows: Sequence[Row], device: torch.device) -> dict[str, Tensor]:
    """A batch as transformers takes it, padded at the right to its longest row."""
    longest = max(len(tokens) for tokens, _ in rows)
    columns = {
        "input_ids": [tokens + [0] * (longest - len(tokens)) for tokens, _ in rows],
        "attention_mask": [[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in rows],
        "labels": [labels + [IGNORE_INDEX] * (longest - len(labels)) for _, labels in rows],
    }
    return {name: torch.tensor(column, device=device) for name, column in columns.items()}


def began(task: Task) -> Peak:
    """Memory from here on: after the imports, also of what transformers imports when it is used."""
    from peft import PeftModel  # noqa: F401
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: F401
    from transformers.utils import logging

    family = config_of(task.model)["model_type"].removesuffix("_text")
    importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    logging.disable_progress_bar()
    return Peak(task.device)


def loaded(task: Task, dtype: torch.dtype | None = None) -> Any:
    """transformers' model, in the work's dtype unless another is given.

    A 4-bit base is taken as it is loaded: `prepare_model_for_kbit_training`, which makes embedding, head and norms
    float32, gave the same loss, and a step of the same time and memory.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = dtype or getattr(torch, task.work.dtype)
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantized = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype) if task.work.method == "qlora" else None
    place = {"": task.device}
    return AutoModelForCausalLM.from_pretrained(
        task.model, dtype=dtype, device_map=place, quantization_config=quantized
    )


def peft_model(task: Task, dtype: torch.dtype | None = None) -> Any:
    """The model with the adapter, as PEFT holds it: in float32 on any base."""
    from peft import PeftModel

    base = loaded(task, dtype)
    base.config.use_cache = False
    return PeftModel.from_pretrained(base, task.adapter, is_trainable=True).train()


def train_peft(task: Task) -> Measurement:
    """PEFT and transformers in a plain loop: padded batches with their mask, the loss of the model, fused AdamW."""
    peak = began(task)
    model = peft_model(task)
    if task.work.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    return looped(task, peak, trained, optimizer, lambda batch: model(**batch).loss, Tensor.backward)


def train_peft_grouped(task: Task) -> Measurement:
    """The same with rows of like lengths in a batch, in a random order of batches: others, and other losses."""
    size = task.work.batch_size
    rows = sorted((row for batch in task.batches for row in batch), key=lambda row: len(row[0]))
    order = torch.randperm(len(task.batches), generator=torch.Generator().manual_seed(0)).tolist()
    found = train_peft(replace(task, batches=[rows[size * i : size * (i + 1)] for i in order]))
    return replace(found, checks={})


def looped(
    task: Task,
    peak: Peak,
    trained: Sequence[Tensor],
    optimizer: Any,
    loss_of: Callable[[dict[str, Tensor]], Tensor],
    backward: Callable[[Tensor], Any],
) -> Measurement:
    """A plain loop over padded batches, with the gradient clipped."""
    device = torch.device(task.device)
    numbers, clock = [], Clock(device)
    for rows in task.batches:
        loss = loss_of(padded(rows, device))
        backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        numbers.append(torch.stack([loss.detach(), norm]).tolist())
        clock.stop()
    losses, norms = zip(*numbers, strict=True)
    return measured(task, clock, peak, first_and_last(losses, norms[0]))


def train_trl(task: Task) -> Measurement:
    """TRL as it is shipped: float32 weights, computed with in bfloat16 by autocast, and gradient checkpointing."""
    return _train_trl(task, torch.float32)


def train_trl_best(task: Task) -> Measurement:
    """TRL at its best setting here: weights in bfloat16, no autocast, no gradient checkpointing."""
    return _train_trl(task, torch.bfloat16, bf16=False, gradient_checkpointing=False)


def _train_trl(task: Task, dtype: torch.dtype, **settings: Any) -> Measurement:
    """SFTTrainer with its own loss, which never holds all logits; rows in the order of everyone else."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    peak, device = began(task), torch.device(task.device)
    clock, records = Clock(device), []

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.stop()

        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            records.append(logs)

    rows = [{"input_ids": tokens, "labels": labels} for batch in task.batches for tokens, labels in batch]
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            folder,
            per_device_train_batch_size=task.work.batch_size,
            max_steps=len(task.batches),
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            max_length=None,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            **settings,
        )
        data = Dataset.from_list(rows)
        trainer = SFTTrainer(peft_model(task, dtype), config, train_dataset=data, callbacks=[Watch()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [record["loss"] for record in records if "loss" in record]
    return measured(task, clock, peak, first_and_last(losses, records[0]["grad_norm"]))


def measured(task: Task, clock: Clock, peak: Peak, checks: dict[str, float]) -> Measurement:
    """A run of training, its warm-up left out; tokens are real ones, never pads."""
    tokens = [sum(len(tokens) for tokens, _ in batch) for batch in task.batches]
    return Measurement(clock.seconds[task.warm_up :], tokens[task.warm_up :], peak.read(), checks)


def answers(task: Task) -> tuple[Tensor, Tensor, list[int]]:
    """The last logits of the first row without the adapter and with it, and the tokens that follow with it."""
    from peft import PeftModel

    began(task)
    model, ids = loaded(task).eval(), torch.tensor([task.rows[0][0]])
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        plain = model(input_ids=ids).logits[0, -ANSWERED:].clone()
        model = PeftModel.from_pretrained(model, task.adapter).eval()
        written = model.generate(input_ids=ids, max_new_tokens=ANSWERED, do_sample=False, pad_token_id=0)
        return plain, model(input_ids=ids).logits[0, -ANSWERED:].clone(), written[0, ids.size(1) :].tolist()
