"""PEFT and transformers in PyTorch's DistributedDataParallel."""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM

dtype, losses = sys.argv[1], []
distributed.init_process_group("gloo")
base = AutoModelForCausalLM.from_pretrained("model", dtype=dtype, use_cache=False)
model = DistributedDataParallel(PeftModel.from_pretrained(base, "adapter", is_trainable=True).train())
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
if distributed.get_rank() == 0:
    model.module.save_pretrained("out")
