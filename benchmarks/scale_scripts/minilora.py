"""minilora: `ml.train` in a process group, the base on every rank, or its blocks divided among them."""

import json
import sys
from pathlib import Path

from torch import distributed

import minilora as ml
from minilora.models.fsdp import load_sharded

(dtype, base), losses = sys.argv[1:], []
distributed.init_process_group("gloo")
model = ml.load_model("model", dtype) if base == "replicated" else load_sharded("model", dtype, "cpu", None)
ml.load_adapter(model, "adapter", trainable=True)
rows = [ml.Example(tokens, tokens) for tokens in json.loads(Path("rows.json").read_text())]
settings = {"lr_scheduler": "constant", "warmup_steps": 0, "batch_size": 2, "gradient_accumulation_steps": 2}
ml.train(model, rows, ml.TrainConfig(epochs=3, **settings), lambda record: losses.append(record["loss"]))
if distributed.get_rank() == 0:
    ml.save_adapter(model, "out")
