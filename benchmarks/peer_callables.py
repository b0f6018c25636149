"""The peers' LoRA layers, merges and sums, as the callables that `minilora.testing` checks.

Each calls the peer's own code as it is installed, and imports it when it is called. What a peer has no option for, its
callable does not take. `peer_nf4` has their 4-bit weights, `peer_training` their losses and loops, `peer_data` their
chat masks and adapter files.

    W (out, in)    b (out) or None    A (r, in)    B (out, r)    magnitude (out)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Adapters = Sequence[tuple[Tensor, Tensor, float]]  # A, B, scale


def base(W: Tensor, b: Tensor | None) -> nn.Linear:
    """Return PyTorch's linear layer with a copy of these."""
    linear = nn.Linear(W.shape[1], W.shape[0], bias=b is not None, dtype=W.dtype)
    return filled(linear, weight=W, bias=b)


def filled(module: nn.Module, **tensors: Tensor | None) -> Any:
    """Copy tensors into a module's parameters; `a__b` is the parameter a.b."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor is not None:
                parameter = module.get_parameter(name.replace("__", "."))
                parameter.copy_(tensor.reshape(parameter.shape))
    return module


# --- PEFT ---


def peft_linear(
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    alpha: float,
    *,
    dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    magnitude: Tensor | None = None,
) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=len(A), lora_alpha=alpha, lora_dropout=dropout, use_rslora=use_rslora, use_dora=use_dora, target_modules=["0"]
    )
    layer = inject_adapter_in_model(config, nn.Sequential(base(W, b)))[0]
    own = {"lora_magnitude_vector__default__weight": magnitude} if use_dora else {}
    return filled(layer, lora_A__default__weight=A, lora_B__default__weight=B, **own)


def peft_merge(W: Tensor, A: Tensor, B: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    layer = peft_linear(W, None, A, B, scale * len(A), use_dora=magnitude is not None, magnitude=magnitude)
    layer.merge()
    return layer.get_base_layer().weight


def peft_sum(adapters: Adapters, weights: Sequence[float]) -> Tensor:
    """PEFT's `add_weighted_adapter`, by concatenation."""
    from peft import LoraConfig, get_peft_model

    A, B, _ = adapters[0]
    model: Any = get_peft_model(
        nn.Sequential(base(B.new_zeros(len(B), A.shape[1]), None)), LoraConfig(target_modules=["0"])
    )
    names = [f"adapter{i}" for i in range(len(adapters))]
    for name, (A, B, scale) in zip(names, adapters, strict=True):
        model.add_adapter(name, LoraConfig(r=len(A), lora_alpha=scale * len(A), target_modules=["0"]))
        filled(model.base_model.model[0], **{f"lora_A__{name}__weight": A, f"lora_B__{name}__weight": B})
    model.add_weighted_adapter(names, list(weights), "sum", combination_type="cat")
    return model.base_model.model[0].get_delta_weight("sum")


# --- litgpt ---


def litgpt_linear(W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, alpha: float, *, dropout: float = 0.0) -> Any:
    from litgpt.lora import LoRALinear, mark_only_lora_as_trainable

    layer = LoRALinear(W.shape[1], W.shape[0], len(A), alpha, dropout, bias=b is not None).to(W.dtype)
    mark_only_lora_as_trainable(layer)
    return filled(layer, linear__weight=W, linear__bias=b, lora_A=A, lora_B=B)


def litgpt_merge(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    layer = litgpt_linear(W, None, A, B, scale * len(A))
    layer.merge()
    return layer.linear.weight


# --- torchtune ---


def torchtune_linear(
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    alpha: float,
    *,
    dropout: float = 0.0,
    use_dora: bool = False,
    magnitude: Tensor | None = None,
) -> Any:
    from torchtune.modules.peft import DoRALinear, LoRALinear, get_adapter_params, set_trainable_params

    layer_type = DoRALinear if use_dora else LoRALinear
    layer = layer_type(W.shape[1], W.shape[0], len(A), alpha, dropout, use_bias=b is not None).to(W.dtype)
    set_trainable_params(layer, get_adapter_params(layer))
    filled(layer, weight=W, bias=b, lora_a__weight=A, lora_b__weight=torch.zeros_like(B))
    if use_dora:
        layer.initialize_dora_magnitude()  # as at the start of training, where B = 0
    return filled(layer, lora_b__weight=B, magnitude=magnitude)


def torchtune_merge(W: Tensor, A: Tensor, B: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    from torchtune.modules.peft import get_merged_lora_ckpt

    state = {"layer.weight": W.clone(), "layer.lora_a.weight": A, "layer.lora_b.weight": B}
    if magnitude is not None:
        state["layer.magnitude"] = magnitude
    return get_merged_lora_ckpt(state, rank=len(A), alpha=scale * len(A))["layer.weight"]
