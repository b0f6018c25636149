"""PEFT and transformers in FSDP2, by accelerate."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

dtype, losses = sys.argv[1], []
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
)
accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
base = AutoModelForCausalLM.from_pretrained("model", dtype=dtype, use_cache=False)
model = PeftModel.from_pretrained(base, "adapter", is_trainable=True).train()
rows = torch.tensor(json.loads(Path("rows.json").read_text()))
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=2, shuffle=True))
for _ in range(3):
    for tokens in loader:
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
state = accelerator.get_state_dict(model)
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained("out", state_dict=state)
