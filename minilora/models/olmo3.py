"""OLMo 3: an OLMo 2 whose layers, except every fourth, have a window  [Team Olmo 2025, Olmo 3].

The layers without one read far, so their rotation may be that of YaRN; the others keep the rotation of the pretraining.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from minilora.llama import Attends, CosSin, LlamaConfig
from minilora.models.family import Family, Values, some_windows
from minilora.models.olmo2 import OLMO2, Olmo2Block
from minilora.models.rotary import build_rope_by_window, rotation_of


class Olmo3Block(Olmo2Block):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__(config, layer)
        self.window = config.windows[layer]

    def attention_branch(self, x: Tensor, rotation: CosSin, documents: Attends) -> Tensor:
        return super().attention_branch(x, rotation_of(self.window, rotation), documents)


def fields(values: Values) -> dict[str, Any]:
    windows = some_windows(values, [(i + 1) % 4 != 0 for i in range(values["num_hidden_layers"])])
    same_theta = {**values, "rope_local_base_freq": values["rope_theta"]}
    return {**windows, "rope": build_rope_by_window(same_theta, values["head_dim"])}


DEFAULTS = {**OLMO2.defaults, "rope_theta": 500_000.0, "sliding_window": 4096}
OLMO3 = Family("Olmo3", DEFAULTS, fields, Olmo3Block, biases=OLMO2.biases)
