"""TinyLoRA: train a few numbers, which weight fixed random matrices between the singular vectors of each W.

    W′ = W + U_r √S_r (Σ_i v_i P_i) √S_r V_rᵀ        W = U S Vᵀ,  P_i (r, r) ~ N(0, 1/r)   [TinyLoRA §4, LoRA-XS §3]

v starts at zero, so a new adapter changes nothing. With `weight_tying` layers share v: at 0 each layer has its own, at
1 all layers have the same, so that u = 13 trains 13 numbers. LoRA-XS trains the r·r numbers of the sum itself.
`LoraLinear` computes this as a LoRA of scale 1 with A = (Σ v_i P_i) √S_r V_rᵀ and B = U_r √S_r.

    in, out  features    r  rank    u  numbers in v

    [TinyLoRA]  Morris et al. 2026, Learning to Reason in 13 Parameters
    [LoRA-XS]   Bałazy et al. 2024, LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minilora.adapter import activate, adapter_tensors, copy_tensors_, inject_adapter, layers_of, linear_layers
from minilora.lora import Linear, LoraAdapter, LoraLinear


class TinyAdapter(LoraAdapter):
    """The tensors of a layer: √S_r V_rᵀ (r, in), U_r √S_r (out, r), P (u, r, r), and v (u,), which layers may share."""

    def __init__(self, base: Linear, v: nn.Parameter, r: int, seed: int, dropout: float):
        super().__init__({}, scale=1.0, dropout=dropout)
        U, S, Vt = torch.linalg.svd(base.weight.detach().float(), full_matrices=False)
        roots = S[:r].sqrt()
        r = len(roots)  # at most the smaller side of W
        P = torch.normal(0.0, r**-0.5, (len(v), r, r), generator=torch.Generator().manual_seed(seed))
        self.v = v
        self.register_buffer("A", roots.unsqueeze(1) * Vt[:r])
        self.register_buffer("lora_B", U[:, :r] * roots)
        self.register_buffer("P", P.to(U.device))

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]
        return torch.einsum("i,ijk->jk", self.v, self.P) @ self.A

    def tensors(self) -> dict[str, Tensor]:
        return {"tinylora_A": self.A, "tinylora_B": self.lora_B, "tinylora_P": self.P}


def attach_tinylora(
    model: nn.Module,
    target_modules: Sequence[str],
    r: int = 2,
    u: int = 64,
    weight_tying: float = 0.0,
    tinylora_dropout: float = 0.0,
    projection_seed: int = 42,
    name: str = "default",
) -> None:
    """Add an adapter to the linear layers of these names; the arguments are those of PEFT's TinyLoraConfig."""
    linears = {key: base for key, base in linear_layers(model).items() if key.rpartition(".")[2] in target_modules}
    groups = max(1, round(len(linears) * (1 - weight_tying)))
    size = max(1, len(linears) // groups)
    vectors = [nn.Parameter(torch.zeros(u, device=next(model.parameters()).device)) for _ in range(groups)]
    layers = {}
    for i, (path, base) in enumerate(linears.items()):
        v = vectors[min(i // size, groups - 1)]
        adapter = TinyAdapter(base, v, r, projection_seed + i, tinylora_dropout)
        layers[path] = LoraLinear(base, path, {name: adapter})
    inject_adapter(model, layers, name)


def all_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter by their names in PEFT's file."""
    layers = layers_of(model, name)
    vectors = dict.fromkeys(layer.adapters[name].v for layer in layers.values())
    return adapter_tensors(layers, name) | {f"base_model.tinylora_v.{i}": v for i, v in enumerate(vectors)}


def save_tinylora(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Write an adapter in PEFT's layout."""
    layers, tensors = layers_of(model, name), all_tensors(model, name)
    adapters = [layer.adapters[name] for layer in layers.values()]
    config = {"peft_type": "TINYLORA", "r": max(len(each.A) for each in adapters), "u": len(adapters[0].v)}
    config |= {"tinylora_dropout": adapters[0].dropout.p, "save_projection": True}
    config["weight_tying"] = 1 - len({each.v for each in adapters}) / len(adapters)
    config["target_modules"] = sorted({where.rpartition(".")[2] for where in layers})
    Path(path).mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, Path(path) / "adapter_model.safetensors")
    (Path(path) / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def load_tinylora(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Attach an adapter that PEFT or `save_tinylora` wrote, frozen. It stays attached if its tensors do not fit."""
    config = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
    names = ("target_modules", "r", "u", "weight_tying", "tinylora_dropout")
    attach_tinylora(model, **{key: config[key] for key in names}, name=name)
    copy_tensors_(all_tensors(model, name), load_file(Path(path) / "adapter_model.safetensors"))
    activate(model, name, trainable=False)
