"""OLMo 2 and 3: a Llama that normalizes the output of each branch of the residual stream, not its input.

    x ← x + rms_norm(attention(x)),  x ← x + rms_norm(mlp(x))        [OLMo Team 2024, 2 OLMo 2 Furious, §2]
    q ← rotate(rms_norm(q)),  k ← rotate(rms_norm(k))                before q and k are divided into heads

So `post_attention_layernorm` belongs to attention here; in a Llama it is the norm before the MLP. In OLMo 3 each fourth
layer sees everything, and YaRN may rotate it. The others have a window and a plain rotation  [Team Olmo 2025, Olmo 3].
"""

from typing import Any

from torch import Tensor

from minilora.llama import MLP, Attends, Attention, Block, CosSin, LlamaConfig, RMSNorm
from minilora.models.family import Family, Values, some_windows
from minilora.models.rotary import build_rope_by_window


class Olmo2Attention(Attention):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__(config, layer)
        self.q_norm = RMSNorm(config.num_attention_heads * config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.num_key_value_heads * config.head_dim, config.rms_norm_eps)

    def heads(self, x: Tensor) -> list[Tensor]:
        rows = (self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x))
        return [part.unflatten(-1, (-1, self.head_dim)) for part in rows]


class Olmo2Block(Block):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__(config, Olmo2Attention(config, layer), MLP(config))
        del self.input_layernorm
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def attention_branch(self, x: Tensor, rotation: CosSin, documents: Attends) -> Tensor:
        return self.post_attention_layernorm(self.self_attn(x, rotation, documents))

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.post_feedforward_layernorm(self.mlp(x))


class Olmo3Block(Olmo2Block):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__(config, layer)
        self.kind = int(config.windows[layer] is None)

    def attention_branch(self, x: Tensor, rotation: CosSin, documents: Attends) -> Tensor:
        cos, sin = rotation
        return super().attention_branch(x, (cos[self.kind], sin[self.kind]), documents)


def fields(values: Values) -> dict[str, Any]:
    """Return the fields of OLMo 3; older files have one `rope_theta` for all layers."""
    windows = some_windows(values, [(i + 1) % 4 != 0 for i in range(values["num_hidden_layers"])])
    one_theta = {**values, "rope_local_base_freq": values["rope_theta"]}
    return {**windows, "rope": build_rope_by_window(one_theta, values["head_dim"])}


DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
OLMO2 = Family("Olmo2", DEFAULTS, build_block=Olmo2Block, biases=("attention_bias",))
THREE = {**DEFAULTS, "rope_theta": 500_000.0, "sliding_window": 4096}
OLMO3 = Family("Olmo3", THREE, fields, Olmo3Block, biases=("attention_bias",))
