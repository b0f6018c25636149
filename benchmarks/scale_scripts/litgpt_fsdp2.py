"""litgpt: the model, loss and sharding of its `finetune_lora`, without recomputation."""

import functools
import json
import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from litgpt.finetune.lora import parallelize_fn, save_lora_checkpoint
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.utils import chunked_cross_entropy, load_checkpoint
from torch.utils.data import DataLoader

precision, losses = {"float32": "32-true", "bfloat16": "bf16-true"}[sys.argv[1]], []
strategy = ModelParallelStrategy(functools.partial(parallelize_fn, activation_checkpointing=False), 2, 1)
fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, precision=precision)
fabric.launch()
with fabric.init_module(empty_init=True):
    model = GPT(Config.from_file("litgpt_model/model_config.yaml"))
mark_only_lora_as_trainable(model)
model = fabric.setup_module(model)
load_checkpoint(fabric, model, Path("litgpt_model/lit_model.pth"), strict=False)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = fabric.setup_optimizers(torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=True))
rows = torch.tensor(json.loads(Path("rows.json").read_text()))
loader = fabric.setup_dataloaders(DataLoader(rows, batch_size=2, shuffle=True))
for _ in range(3):
    for tokens in loader:
        logits = model(tokens, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        loss = chunked_cross_entropy(logits, tokens[..., 1:])
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
save_lora_checkpoint(fabric, model, Path("out.pth"))
