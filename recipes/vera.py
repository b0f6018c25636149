"""VeRA: all layers share two frozen random matrices, and each layer trains two vectors.

    y = W x + b + Λ_b B Λ_d A x            Λ_b, Λ_d diagonal [VeRA eq. 2]

A and B are drawn once, as large as the largest layer needs; a layer takes the first columns of A and the first rows of
B. λ_b starts at zero, so a new adapter changes nothing, and λ_d at `d_initial`. To a `LoraLinear` this is a LoRA of
scale 1 whose A is Λ_d A and whose B is Λ_b B: forward, several adapters, merging and training are its own.

    in, out  features    r  rank

    [VeRA]  Kopiczko et al. 2023, VeRA: Vector-based Random Matrix Adaptation
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minilora.adapter import activate, adapter_tensors, copy_tensors_, inject_adapter, layers_of, linear_layers
from minilora.lora import Linear, LoraAdapter, LoraLinear

SHARED = {"base_model.vera_A": "A", "base_model.vera_B": "B"}  # names in PEFT's file


class Shared(nn.Module):
    """The frozen matrices: A (r, most in), B (most out, r), each ~ U(-√(6/columns), √(6/columns)), as in PEFT."""

    def __init__(self, r: int, inner: int, outer: int, key: int):
        super().__init__()
        generator = torch.Generator().manual_seed(key)
        for name, shape in (("A", (r, inner)), ("B", (outer, r))):
            bound = (6 / shape[1]) ** 0.5
            self.register_buffer(name, torch.empty(shape).uniform_(-bound, bound, generator=generator))


class VeraAdapter(LoraAdapter):
    """The vectors of one layer: λ_b (out) and λ_d (r)."""

    def __init__(self, base: Linear, shared: Shared, d_initial: float, dropout: float):
        super().__init__({}, scale=1.0, dropout=dropout)
        self.shared, self.inner = shared, base.in_features
        self.vera_lambda_b = nn.Parameter(torch.zeros(base.out_features))
        self.vera_lambda_d = nn.Parameter(torch.full((len(shared.A),), d_initial))

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]
        return self.vera_lambda_d.unsqueeze(1) * self.shared.A[:, : self.inner]

    @property
    def lora_B(self) -> Tensor:  # type: ignore[override]
        return self.vera_lambda_b.unsqueeze(1) * self.shared.B[: len(self.vera_lambda_b)]

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("vera_lambda_b", "vera_lambda_d")}


def attach_vera(
    model: nn.Module,
    target_modules: Sequence[str],
    r: int = 256,
    d_initial: float = 0.1,
    vera_dropout: float = 0.0,
    projection_prng_key: int = 0,
    name: str = "default",
) -> None:
    """Add an adapter to the linear layers of these names; the arguments are those of PEFT's VeraConfig."""
    linears = {p: base for p, base in linear_layers(model).items() if p.rpartition(".")[2] in target_modules}
    sizes = [(base.in_features, base.out_features) for base in linears.values()] or [(0, 0)]
    shared = Shared(r, *map(max, zip(*sizes, strict=True)), projection_prng_key)
    adapters = {path: VeraAdapter(base, shared, d_initial, vera_dropout) for path, base in linears.items()}
    inject_adapter(model, {path: LoraLinear(linears[path], path, {name: adapters[path]}) for path in linears}, name)


def save_vera(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Write the vectors and the shared matrices in PEFT's layout."""
    layers = layers_of(model, name)
    first = next(iter(layers.values())).adapters[name]
    config = {"peft_type": "VERA", "r": len(first.shared.A), "vera_dropout": first.dropout.p, "save_projection": True}
    config["target_modules"] = sorted({where.rpartition(".")[2] for where in layers})
    Path(path).mkdir(parents=True, exist_ok=True)
    shared = {key: getattr(first.shared, each) for key, each in SHARED.items()}
    save_file(adapter_tensors(layers, name) | shared, Path(path) / "adapter_model.safetensors")
    (Path(path) / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def load_vera(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Attach an adapter that PEFT or `save_vera` wrote, frozen; it stays attached if tensors do not fit."""
    config = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
    attach_vera(model, config["target_modules"], config["r"], vera_dropout=config["vera_dropout"], name=name)
    layers = layers_of(model, name)
    shared = next(iter(layers.values())).adapters[name].shared
    own = adapter_tensors(layers, name) | {key: getattr(shared, each) for key, each in SHARED.items()}
    copy_tensors_(own, load_file(Path(path) / "adapter_model.safetensors"))
    activate(model, name, trainable=False)
