"""LoRA on experts that are stacked in one tensor, as transformers has them; PEFT's `target_parameters`.

    W_e ← W_e + s·B_e A_e        for each expert e        [LoRA eq. 3]

The experts of a layer are not linear modules, so they cannot be wrapped: their module computes with the tensor
(E, out, in) itself. So it is called with the changed tensor in place of its own. All experts' factors are two matrices,
as PEFT saves them: A (E·r, in), one expert after the other, and B (out, r·E), with the expert as the fastest index.

    E  experts    r  rank    in, out  features    s  scale

    [LoRA]  Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models

    attach_experts(model, ["gate_up_proj", "down_proj"], r=8, lora_alpha=16, is_transposed=False)  # then train
    save_experts(model, "adapter")  # PEFT reads it
    merge_experts(model)
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

import minilora as ml
from minilora.adapter import PREFIX, replace_modules
from minilora.lora import lora_delta, lora_scale


class LoraExperts(nn.Module):
    """A frozen module with adapters of stacked parameters, (E, out, in) or transposed (E, in, out), as in gpt-oss."""

    def __init__(self, base: nn.Module, names: Sequence[str], r: int, lora_alpha: float, is_transposed: bool):
        super().__init__()
        self.base, self.is_transposed = base, is_transposed
        self.r, self.lora_alpha = r, lora_alpha
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name in names:
            weight = base.get_parameter(name)
            experts, out, inner = (weight.mT if is_transposed else weight).shape
            self.lora_A[name] = nn.init.kaiming_uniform_(weight.new_empty(experts * r, inner), a=5**0.5)  # as PEFT
            self.lora_B[name] = weight.new_zeros(out, r * experts)

    def changed_parameters(self) -> dict[str, Tensor]:
        """Return W + s·B A of all experts, by the parameter's name."""
        changed = {}
        for name, lora_A in self.lora_A.items():
            A = lora_A.unflatten(0, (-1, self.r))  # (E, r, in)
            B = self.lora_B[name].unflatten(1, (self.r, -1)).permute(2, 0, 1)  # (E, out, r)
            delta = lora_delta(A, B, lora_scale(self.r, self.lora_alpha))
            changed[name] = self.base.get_parameter(name) + (delta.mT if self.is_transposed else delta)
        return changed

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.base, self.changed_parameters(), args, kwargs)


def attach_experts(model: nn.Module, names: Sequence[str], r: int, lora_alpha: float, is_transposed: bool) -> None:
    """Give the stacked parameters of these names adapters, and freeze everything else."""
    found = {module: [name for name in module._parameters if name in names] for module in model.modules()}
    pairs = [(m, LoraExperts(m, own, r, lora_alpha, is_transposed)) for m, own in found.items() if own]
    if not pairs:
        raise ml.TargetError(f"no module of the model has a parameter called {list(names)}")
    model.requires_grad_(False)
    replace_modules(model, pairs)


@torch.no_grad()
def merge_experts(model: nn.Module) -> None:
    """Fold the adapters into the parameters, and put the modules back."""
    layers = [module for module in model.modules() if isinstance(module, LoraExperts)]
    for layer in layers:
        for name, weight in layer.changed_parameters().items():
            layer.base.get_parameter(name).copy_(weight)
    replace_modules(model, [(layer, layer.base) for layer in layers])


def save_experts(model: nn.Module, directory: str | Path) -> None:
    """Write the adapters in PEFT's layout, which nests a wrapper for each parameter, the first one innermost."""
    layers = {path: each for path, each in model.named_modules() if isinstance(each, LoraExperts)}
    if not layers:
        raise ml.TargetError("the model has no adapters of experts")
    tensors, targets = {}, []
    for path, layer in layers.items():
        for depth, name in enumerate(reversed(layer.lora_A)):
            where = f"{PREFIX}{path}.{'base_layer.' * depth}"
            tensors[f"{where}lora_A.weight"] = layer.lora_A[name].contiguous()
            tensors[f"{where}lora_B.weight"] = layer.lora_B[name].contiguous()
            targets.append(f"{path}.{name}")
    config = {"peft_type": "LORA", "r": layer.r, "lora_alpha": layer.lora_alpha}  # the numbers are those of all layers
    config |= {"target_modules": [], "target_parameters": targets}
    Path(directory).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(directory) / "adapter_model.safetensors")
    (Path(directory) / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
