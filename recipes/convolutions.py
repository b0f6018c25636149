"""LoRA on convolutions, as PEFT has it: a convolution to r channels, and one of size 1 back to all of them.

    y = W ∗ x + b + s·B ∗ (A ∗ x)        A (r, in, *kernel), B (out, r, 1, …)        [LoRA eq. 3]

A convolution applies its weight as a matrix (out, in·kernel) to each patch of its input, so the update of that matrix
is s·B A, with A (r, in·kernel). A has the stride, the padding and the dilation of W; B has none.

    [LoRA]  Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models

    attach_convolutions(model, ["conv1", "conv2"], r=8, lora_alpha=16)  # then train the parameters that need a gradient
    save_convolutions(model, "adapter")                                # `peft.PeftModel.from_pretrained` reads it
    merge_convolutions(model)
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

import minilora as ml
from minilora.adapter import PREFIX, replace_modules
from minilora.lora import lora_delta, lora_scale

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LoraConv(nn.Module):
    """A frozen convolution with one adapter, in its dtype.

    Raises:
        TargetError: the convolution has groups, and the sum of both would have none.
    """

    def __init__(self, base: Any, r: int, lora_alpha: float):
        super().__init__()
        if base.groups != 1:
            raise ml.TargetError(f"found a convolution of {base.groups} groups, need one without groups")
        self.base, self.r, self.lora_alpha = base.requires_grad_(False), r, lora_alpha
        shape = base.kernel_size, base.stride, base.padding, base.dilation
        down = type(base)(base.in_channels, r, *shape, bias=False, padding_mode=base.padding_mode)
        up = type(base)(r, base.out_channels, 1, bias=False)
        nn.init.zeros_(up.weight)  # so that it changes nothing yet; A is drawn by PyTorch, as PEFT's
        self.lora_A, self.lora_B = down.to(base.weight), up.to(base.weight)

    @property
    def scale(self) -> float:
        return lora_scale(self.r, self.lora_alpha)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.scale * self.lora_B(self.lora_A(x))
        return y

    def merged(self) -> nn.Module:
        """Return a convolution of the weight W + s·B A."""
        merged = copy.deepcopy(self.base)
        delta = lora_delta(self.lora_A.weight.flatten(1), self.lora_B.weight.flatten(1), self.scale)
        merged.weight.data += delta.detach().view_as(merged.weight)
        return merged


def attach_convolutions(model: nn.Module, names: Sequence[str], r: int, lora_alpha: float) -> None:
    """Give the convolutions with these last names an adapter, and freeze everything else."""
    found = [m for path, m in model.named_modules() if path.rpartition(".")[2] in names and isinstance(m, CONVOLUTIONS)]
    if not found:
        raise ml.TargetError(f"the model has no convolution called {list(names)}")
    model.requires_grad_(False)
    replace_modules(model, [(base, LoraConv(base, r, lora_alpha)) for base in found])


def merge_convolutions(model: nn.Module) -> None:
    """Fold the adapters into the weights, and leave plain convolutions."""
    replace_modules(model, [(m, m.merged()) for m in model.modules() if isinstance(m, LoraConv)])


def save_convolutions(model: nn.Module, directory: str | Path) -> None:
    """Write the adapters in PEFT's layout."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoraConv)}
    tensors = {}
    for path, layer in layers.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A.weight.contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B.weight.contiguous()
    first = next(iter(layers.values()))
    config = {"peft_type": "LORA", "r": first.r, "lora_alpha": first.lora_alpha, "target_modules": list(layers)}
    Path(directory).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(directory) / "adapter_model.safetensors")
    (Path(directory) / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
