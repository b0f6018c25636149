"""Freeze what bitsandbytes makes of one weight, so that the default suite needs no bitsandbytes.

python -m tests.golden.make_quantized        (extra `parity`)
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

FILE = Path(__file__).parent / "quantized.safetensors"
KINDS = {f"{kind}-{name}": (kind, name == "double") for kind in ("nf4", "fp4") for name in ("double", "plain")}


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
    save_file(frozen, FILE)


if __name__ == "__main__":
    main()
