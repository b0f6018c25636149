"""The catalogue of mistakes: for each kind of implementation, wrong ones by what is wrong with them.

Each is one of `implementations.py` with a mistake, and is called like it. A check that fails runs those of its kind on
the cases that fail, and names the mistake that has the same result. Every check refuses them all:

    >>> import torch
    >>> W, A, B = torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1)
    >>> CATALOGUE["merge"]["the scale is missing"](W, A, B, 0.5).item()
    1.0
"""

from collections.abc import Mapping
from typing import Any

from minilora.testing.mistakes_data import ACCUMULATION, CHAT_MASK, LOSS_MASKING
from minilora.testing.mistakes_layers import ADAPTER_SUM, DORA, LORA, MERGE, MERGE_DORA, RSLORA
from minilora.testing.mistakes_nf4 import DOUBLE_QUANT, LINEAR4BIT, NF4

CATALOGUE: Mapping[str, Mapping[str, Any]] = {
    "lora": LORA,
    "rslora": RSLORA,
    "dora": DORA,
    "merge": MERGE,
    "merge_dora": MERGE_DORA,
    "adapter_sum": ADAPTER_SUM,
    "nf4": NF4,
    "double_quant": DOUBLE_QUANT,
    "linear4bit": LINEAR4BIT,
    "loss_masking": LOSS_MASKING,
    "accumulation": ACCUMULATION,
    "chat_mask": CHAT_MASK,
}
