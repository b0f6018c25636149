"""What the backward pass may compute again instead of keeping it: a file without torch, for configs that name it."""

from typing import Literal

Recompute = Literal["none", "mlp", "block"]  # nothing, the MLPs, or whole blocks but for their inputs
