"""minilora as a reader of the kit: python -m conformance.readers.minilora_reader BASE TOKENS OUT [ADAPTER ...]."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import minilora as ml


@torch.no_grad()
def logits(base: Path, tokens: Sequence[int], adapters: Sequence[Path], dtype: str = "float32") -> Any:
    """Return the logits of one document with all adapters active."""
    model = ml.load_model(base, dtype=dtype)
    names = [f"adapter {i}" for i in range(len(adapters))]
    for name, path in zip(names, adapters, strict=True):
        ml.load_adapter(model, path, name)
    if names:
        ml.set_adapter(model, names)
    return model(torch.tensor([tokens]))[0].double().numpy()


if __name__ == "__main__":
    base, tokens, out, *adapters = map(Path, sys.argv[1:])
    np.save(out, logits(base, json.loads(tokens.read_bytes()), adapters))
