"""PEFT in DistributedDataParallel, by transformers' Trainer."""

import json
import sys
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

base = AutoModelForCausalLM.from_pretrained("model", dtype=sys.argv[1], use_cache=False)
model = PeftModel.from_pretrained(base, "adapter", is_trainable=True)
rows = [{"input_ids": tokens, "labels": tokens} for tokens in json.loads(Path("rows.json").read_text())]
settings = {"per_device_train_batch_size": 2, "num_train_epochs": 3, "learning_rate": 2e-4, "use_cpu": True}
settings |= {"lr_scheduler_type": "constant", "logging_steps": 1, "ddp_find_unused_parameters": False}
trainer = Trainer(model, TrainingArguments("out", **settings), default_data_collator, rows)
trainer.train()
trainer.save_model("out")
losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
