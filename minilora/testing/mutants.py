"""Planted mistakes, to measure which of them a check finds: `MUTANTS`, about fifteen for each kind of callable.

    >>> import torch
    >>> from minilora.testing.implementations import merge
    >>> wrong = next(mutant for mutant in MUTANTS if mutant.name == "merged without the scale")
    >>> W, A, B = torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1)
    >>> merge(W, A, B, 0.5).item(), wrong.plant(merge)(W, A, B, 0.5).item()
    (0.5, 1.0)

Each `plant` works on your own correct callable of that kind as well, if it takes and returns torch tensors; some ignore
it and return one of their own. Of `nf4` and `double_quant` it takes and returns the pair (quantize, dequantize), of
`adapter_directory` the mapping {"config": …, "tensors": …} before it is written, and of `merge` a function that merges
DoRA, too, merge(W, A, B, scale, magnitude): the last three mistakes of that kind are mistakes of DoRA.
"""

from __future__ import annotations

from dataclasses import dataclass

from minilora.testing.mutants_data import ACCUMULATION, ADAPTER_DIRECTORY, CHAT_MASK, LOSS_MASKING
from minilora.testing.mutants_dora import ADAPTER_SUM, DORA, MERGE
from minilora.testing.mutants_lora import LORA, Plant
from minilora.testing.mutants_nf4 import DOUBLE_QUANT, LINEAR4BIT, NF4


@dataclass(frozen=True)
class Mutant:
    """One mistake: `plant(correct)` takes a correct callable of the kind and returns one with the mistake."""

    name: str
    kind: str
    plant: Plant
    source: str = ""  # where it was seen, a thread as owner/name#number or a library; or nothing


TABLES = {
    "lora": LORA,
    "dora": DORA,
    "merge": MERGE,
    "adapter_sum": ADAPTER_SUM,
    "nf4": NF4,
    "double_quant": DOUBLE_QUANT,
    "linear4bit": LINEAR4BIT,
    "loss_masking": LOSS_MASKING,
    "accumulation": ACCUMULATION,
    "chat_mask": CHAT_MASK,
    "adapter_directory": ADAPTER_DIRECTORY,
}
MUTANTS = tuple(Mutant(name, kind, *rest) for kind, table in TABLES.items() for name, *rest in table)
