"""mlx-lm as a reader of the kit: python -m conformance.readers.mlx_reader [--export] BASE TOKENS OUT [ADAPTER ...].

mlx-lm has an adapter format of its own. With --export it reads the adapter that `minilora export` writes for it.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_adapters, load_model

from conformance.readers.exported import exported


def logits(base: Path, tokens: Sequence[int], adapters: Sequence[Path]) -> Any:
    """Return the logits of one document with all adapters active, in float32."""
    mx.set_default_device(mx.cpu)
    model, _ = load_model(base)
    for path in adapters:
        load_adapters(model, str(path))
    model.set_dtype(mx.float32)
    return np.array(model.eval()(mx.array([tokens]))[0])


if __name__ == "__main__":
    is_exported = sys.argv[1] == "--export"
    base, tokens, out, *adapters = map(Path, sys.argv[1 + is_exported :])
    with tempfile.TemporaryDirectory() as scratch:
        if is_exported:
            adapters = exported(base, adapters, "mlx-lm", Path(scratch) / "adapter")
        np.save(out, logits(base, json.loads(tokens.read_bytes()), adapters))
