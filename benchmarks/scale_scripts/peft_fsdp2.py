"""PEFT in FSDP2 by PyTorch's `fully_shard`; accelerate 1.15 uses DistributedDataParallel on the CPU, without a word."""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM

dtype, losses = sys.argv[1], []
distributed.init_process_group("gloo")
base = AutoModelForCausalLM.from_pretrained("model", dtype=dtype, use_cache=False)
model = PeftModel.from_pretrained(base, "adapter", is_trainable=True, autocast_adapter_dtype=False).train()
for block in base.model.layers:
    fully_shard(block)
fully_shard(model)
rows = torch.tensor(json.loads(Path("rows.json").read_text()))
loader = DataLoader(rows, batch_size=2, sampler=DistributedSampler(rows))
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=True)
for epoch in range(3):
    loader.sampler.set_epoch(epoch)
    for tokens in loader:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
if distributed.get_rank() == 0:
    model.save_pretrained("out", state_dict=state)
