"""Freeze the logits of transformers' models, so that the default suite needs no transformers.

python -m tests.golden.make_models        (extra `parity`)
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.models import FAMILIES, tiny_model, token_ids

FILE = Path(__file__).parent / "models.safetensors"
LENGTHS = [10, 20]  # longer than windows


def main() -> None:
    from tests.parity.test_models import theirs_model

    frozen = {}
    for seed, family in enumerate(FAMILIES):
        tokens, theirs = token_ids(seed, sum(LENGTHS)), theirs_model(tiny_model(family, dtype=torch.float32))
        with torch.no_grad():
            logits = [theirs(input_ids=part.unsqueeze(0)).logits.squeeze(0) for part in tokens.split(LENGTHS)]
        frozen |= {f"{family}.tokens": tokens, f"{family}.logits": torch.cat(logits)}
    save_file(frozen, FILE)


if __name__ == "__main__":
    main()
