"""Extract the adapter between two models: the best approximation of their difference at a rank.

    ΔW = W₁ - W₀ = U diag(σ) Vᵀ ≈ s·B A,    A = √(σ_r / s) V_rᵀ,    B = U_r √(σ_r / s)    [EY]

No other matrix of rank r is nearer to ΔW. Both models are in memory, with dense weights. From directories:

    python recipes/extract.py BASE TUNED OUT RANK

    [EY]  Eckart & Young 1936, The Approximation of One Matrix by Another of Lower Rank
"""

import sys

import torch
from torch import nn

import minilora as ml
from minilora.adapter import layers_of


@torch.no_grad()
def extract(base: nn.Module, tuned: nn.Module, config: ml.LoraConfig) -> tuple[dict[str, float], list[str]]:
    """Attach to `base` the adapter that makes it `tuned`, as nearly as its rank allows.

    Return ‖ΔW - s·B A‖ / ‖ΔW‖ of each adapted linear, by its path, and the names of all other parameters that differ.
    """
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    if [(name, p.shape) for name, p in before.items()] != [(name, p.shape) for name, p in after.items()]:
        raise ml.TargetError("the two models need the same parameters, in the same shapes")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    ml.attach(base, config)
    errors = {}
    for path, layer in layers_of(base, "default").items():
        adapter, delta = layer.adapters["default"], after[f"{path}.weight"].float() - layer.base.weight.float()
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        r = config.rank(path)
        root = (S[:r] / adapter.scale).sqrt()
        adapter.lora_A.copy_(root[:, None] * Vh[:r])
        adapter.lora_B.copy_(U[:, :r] * root)
        errors[path] = (S[r:].norm() / S.norm()).item() if S.any() else 0.0
    return errors, [name for name in changed if name.removesuffix(".weight") not in errors]


def main(base: str, tuned: str, out: str, rank: str) -> None:
    model = ml.load_model(base)
    errors, others = extract(model, ml.load_model(tuned), ml.LoraConfig(r=int(rank), lora_alpha=int(rank)))
    ml.save_adapter(model, out)
    worst = max(errors, key=lambda path: errors[path])
    print(f"adapter written to {out}; it lacks at most {errors[worst]:.1%} of the change of a weight, in {worst}")
    if others:
        print(f"not in the adapter: {len(others)} other parameters that differ, such as {others[0]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
