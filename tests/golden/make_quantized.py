"""Freeze what bitsandbytes makes of some weights, so that the default suite needs no bitsandbytes.

python -m tests.golden.make_quantized        (extra `parity`)
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

FILE = Path(__file__).parent / "quantized.safetensors"
KINDS = {f"{kind}-{name}": (kind, name == "double") for kind in ("nf4", "fp4") for name in ("double", "plain")}
SMALL = {  # a part of a block, parts at the end, whole blocks
    f"{kind}-{rows}x{columns}": (kind, (rows, columns))
    for kind in ("midpoints", "zeros", "constant")
    for rows, columns in ((5, 7), (3, 65), (1, 64), (4, 64))
}


def main() -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit, quantize_blockwise

    weight = 0.02 * torch.randn(260, 64, generator=torch.Generator().manual_seed(0))  # 260 blocks: two scales
    weight.view(-1)[::500] *= 30  # outliers
    weight[7] = 0
    frozen = {"dense": weight.bfloat16()}
    for name, (kind, is_double) in KINDS.items():
        packed, state = quantize_4bit(frozen["dense"], quant_type=kind, blocksize=64, compress_statistics=is_double)
        frozen[f"{name}.weight"] = packed
        frozen |= {f"{name}.weight.{key}": part.clone() for key, part in state.as_dict(packed=True).items()}
        if is_double:
            frozen[f"{name}.dense"] = dequantize_4bit(packed, state)
    absmax = torch.rand(4096, generator=torch.Generator().manual_seed(1))  # one in 500 shows how codes are rounded
    codes, state = quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    frozen |= {"absmax": absmax, "absmax.codes": codes, "absmax.scales": state.absmax}
    for name, (kind, size) in SMALL.items():
        weight = small_weight(kind, size)
        packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
        plain = quantize_4bit(weight, quant_type="nf4", blocksize=64)[1].absmax
        parts = {"packed": packed.view(-1), "plain": plain}
        parts |= {"absmax": state.absmax, "scales": state.state2.absmax, "offset": state.offset}
        frozen |= {f"{name}.dense": weight} | {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(frozen, FILE)


def small_weight(kind: str, size: tuple[int, int]) -> torch.Tensor:
    """Zeros, a constant, or quotients midway between levels, which a product and a division round apart."""
    if kind != "midpoints":
        return torch.full(size, {"zeros": 0.0, "constant": -0.3}[kind])
    from bitsandbytes.functional import get_4bit_type

    levels = get_4bit_type("nf4", device="cpu")
    quotients = torch.cat([torch.ones(1), (levels[1:] + levels[:-1]) / 2])
    blocks = torch.arange(size[0] * size[1]) // 64
    return (quotients.repeat(99)[: len(blocks)] * torch.tensor([0.3, 0.7, 1.1, 1.3])[blocks]).view(size)


if __name__ == "__main__":
    main()
