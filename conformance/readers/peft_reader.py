"""PEFT as a reader of the kit: python -m conformance.readers.peft_reader BASE TOKENS OUT [ADAPTER ...]."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel


@torch.no_grad()
def logits(base: Path, tokens: Sequence[int], adapters: Sequence[Path], dtype: str = "float32") -> Any:
    """Return the logits of one document with all adapters active."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    return adapt(model, adapters)(input_ids=torch.tensor([tokens])).logits[0].double().numpy()


def adapt(model: Any, adapters: Sequence[Path]) -> Any:
    """Return the model with all adapters active."""
    names = [f"adapter{i}" for i in range(len(adapters))]
    for name, path in zip(names, adapters, strict=True):
        if isinstance(model, PeftModel):
            model.load_adapter(path, name)
        else:
            model = PeftModel.from_pretrained(model, path, name)
    if names:
        model.base_model.set_adapter(names)
    return model.eval()


if __name__ == "__main__":
    base, tokens, out, *adapters = map(Path, sys.argv[1:])
    np.save(out, logits(base, json.loads(tokens.read_bytes()), adapters))
