"""The peers' LoRA layers, merges, sums and 4-bit weights, as the callables that `minilora.testing` checks.

Each calls the peer's own code as it is installed, and imports it when it is called. What a peer has no option for, its
callable does not take. `peer_training` has their losses, loops and chat masks.

    W (out, in)    b (out) or None    A (r, in)    B (out, r)    magnitude (out)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        r=len(A),
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=use_rslora,
        use_dora=use_dora,
        target_modules=["0"],
    )
    layer = inject_adapter_in_model(config, nn.Sequential(base(W, b)))[0]
    own = {"lora_magnitude_vector__default__weight": magnitude} if use_dora else {}
    return filled(layer, lora_A__default__weight=A, lora_B__default__weight=B, **own)


def peft_merge(W: Tensor, A: Tensor, B: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    layer = peft_linear(W, None, A, B, scale * len(A), use_dora=magnitude is not None, magnitude=magnitude)
    layer.merge()
    return layer.get_base_layer().weight


def peft_sum(combination_type: str, **options: Any) -> Callable[[Adapters, Sequence[float]], Tensor]:
    """Return a sum by PEFT's `add_weighted_adapter`."""

    def add(adapters: Adapters, weights: Sequence[float]) -> Tensor:
        from peft import LoraConfig, get_peft_model

        A, B, _ = adapters[0]
        names = [f"adapter{i}" for i in range(len(adapters))]
        model: Any = None
        for name, (A, B, scale) in zip(names, adapters, strict=True):
            config = LoraConfig(r=len(A), lora_alpha=scale * len(A), target_modules=["0"])
            if model is None:
                model = get_peft_model(nn.Sequential(base(B.new_zeros(len(B), A.shape[1]), None)), config, name)
            else:
                model.add_adapter(name, config)
            own = {f"lora_A__{name}__weight": A, f"lora_B__{name}__weight": B}
            filled(model.base_model.model[0], **own)
        extra = {key: value(adapters) if callable(value) else value for key, value in options.items()}
        model.add_weighted_adapter(names, list(weights), "sum", combination_type=combination_type, **extra)
        return model.base_model.model[0].get_delta_weight("sum")

    return add


def total_rank(adapters: Adapters) -> int:
    A, B, _ = adapters[0]
    return min(sum(len(A) for A, _, _ in adapters), A.shape[1], len(B))


def peft_directory(folder: str, **options: Any) -> str:
    """Save an adapter of a tiny model with PEFT's `save_pretrained`."""
    from peft import LoraConfig, get_peft_model

    model: Any = nn.Sequential()
    model.add_module("q_proj", nn.Linear(8, 12))
    model.add_module("v_proj", nn.Linear(12, 6))
    settings = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"], **options}
    get_peft_model(model, LoraConfig(**settings)).save_pretrained(folder)
    return folder


# --- litgpt ---


def litgpt_linear(
    W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, alpha: float, *, dropout: float = 0.0
) -> Any:
    from litgpt.lora import LoRALinear, mark_only_lora_as_trainable

    layer = LoRALinear(W.shape[1], W.shape[0], len(A), alpha, dropout, bias=b is not None).to(W.dtype)
    mark_only_lora_as_trainable(layer)
    return filled(layer, linear__weight=W, linear__bias=b, lora_A=A, lora_B=B)


def litgpt_merge(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    layer = litgpt_linear(W, None, A, B, scale * len(A))
    layer.merge()
    return layer.linear.weight


# --- loralib ---


def loralib_linear(
    W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, alpha: float, *, dropout: float = 0.0
) -> Any:
    return _loralib_linear(W, b, A, B, alpha, dropout)


def loralib_unmerged(
    W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, alpha: float, *, dropout: float = 0.0
) -> Any:
    return _loralib_linear(W, b, A, B, alpha, dropout, merge_weights=False)


def _loralib_linear(
    W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, alpha: float, dropout: float, **options: Any
) -> Any:
    import loralib

    layer = loralib.Linear(W.shape[1], W.shape[0], len(A), alpha, dropout, bias=b is not None, **options)
    loralib.mark_only_lora_as_trainable(layer)
    return filled(layer.to(W.dtype), weight=W, bias=b, lora_A=A, lora_B=B)


def loralib_merge(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    layer = loralib_linear(W, None, A, B, scale * len(A))
    layer.eval()  # returns None
    return layer.weight


# --- lora-pytorch ---


def lora_pytorch_linear(
    W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, alpha: float, *, dropout: float = 0.0
) -> Any:
    from lora_pytorch import LoRA
    from lora_pytorch.modules.linear import LinearLoRAModule

    branch = LinearLoRAModule(W.shape[1], W.shape[0], len(A), alpha, dropout, dtype=W.dtype)
    return LoRA(base(W, b), filled(branch, in_proj=A.T, out_proj=B.T))


def lora_pytorch_merge(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return lora_pytorch_linear(W, None, A, B, scale * len(A)).merge_lora().weight


# --- torchtune ---


def torchtune_linear(
    W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, alpha: float, *, dropout: float = 0.0
) -> Any:
    from torchtune.modules.peft import LoRALinear

    return _torchtune_linear(LoRALinear, W, b, A, B, alpha, dropout)


def torchtune_dora(
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    alpha: float,
    *,
    dropout: float = 0.0,
    use_dora: bool = True,
    magnitude: Tensor | None = None,
) -> Any:
    from torchtune.modules.peft import DoRALinear

    layer = _torchtune_linear(DoRALinear, W, b, A, torch.zeros_like(B), alpha, dropout)
    layer.initialize_dora_magnitude()  # as at the start of training, where B = 0
    return filled(layer, lora_b__weight=B, magnitude=magnitude)


def _torchtune_linear(
    layer_type: Any, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, alpha: float, dropout: float
) -> Any:
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    layer = layer_type(W.shape[1], W.shape[0], len(A), alpha, dropout, use_bias=b is not None).to(W.dtype)
    set_trainable_params(layer, get_adapter_params(layer))
    return filled(layer, weight=W, bias=b, lora_a__weight=A, lora_b__weight=B)


def torchtune_merge(W: Tensor, A: Tensor, B: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    from torchtune.modules.peft import get_merged_lora_ckpt

    state = {"layer.weight": W.clone(), "layer.lora_a.weight": A, "layer.lora_b.weight": B}
    if magnitude is not None:
        state["layer.magnitude"] = magnitude
    return get_merged_lora_ckpt(state, rank=len(A), alpha=scale * len(A))["layer.weight"]


# --- adapters (AdapterHub) ---


def adapters_linear(
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
    layer = _adapters_layer(W, b)
    _adapters_add(layer, "adapter", A, B, alpha, dropout=dropout, use_dora=use_dora, magnitude=magnitude)
    layer.adapters_config.active_setup = _parsed("adapter")
    for parameter in (layer.weight, layer.bias):  # as `train_adapter` of a model does
        if parameter is not None:
            parameter.requires_grad_(False)
    return layer


def _adapters_layer(W: Tensor, b: Tensor | None) -> Any:
    from adapters import ModelAdaptersConfig
    from adapters.methods.lora import LoRALinear
    from transformers import PretrainedConfig

    return LoRALinear.wrap(base(W, b), "selfattn", PretrainedConfig(), ModelAdaptersConfig(), attn_key="q")


def _adapters_add(layer: Any, name: str, A: Tensor, B: Tensor, alpha: float, **options: Any) -> None:
    from adapters import LoRAConfig

    magnitude, dtype = options.pop("magnitude", None), str(A.dtype).removeprefix("torch.")
    config = LoRAConfig(r=len(A), alpha=alpha, attn_matrices=["q"], dtype=dtype, **options)
    layer.adapters_config.add(name, config)
    layer.add_adapter(name, 0)
    own = {"m__weight": magnitude} if options.get("use_dora") else {}
    filled(layer.loras[name], lora_A=A, lora_B=B, **own)


def _parsed(name: str) -> Any:
    from adapters.composition import Stack

    return Stack(name)


def adapters_merge(W: Tensor, A: Tensor, B: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    layer = adapters_linear(W, None, A, B, scale * len(A), use_dora=magnitude is not None, magnitude=magnitude)
    layer.merge_adapter("adapter")
    return layer.weight


def adapters_sum(combine_strategy: str) -> Callable[[Adapters, Sequence[float]], Tensor]:
    """Return a sum by the layer's `average_adapter`.

    It takes adapters of one rank and one alpha: ranks are padded with zeros, and scales are multiplied into B.
    """

    def add(adapters: Adapters, weights: Sequence[float]) -> Tensor:
        A, B, _ = adapters[0]
        most = max(len(A) for A, _, _ in adapters)
        layer, names = _adapters_layer(B.new_zeros(len(B), A.shape[1]), None), []
        for i, (A, B, scale) in enumerate(adapters):
            names.append(f"adapter{i}")
            more = most - len(A)
            padded = nn.functional.pad(A, (0, 0, 0, more)), nn.functional.pad(B * scale, (0, more))
            _adapters_add(layer, names[-1], *padded, most)
        rank = total_rank(adapters) if "svd" in combine_strategy else most
        config = layer.adapters_config.get(names[0])
        layer.adapters_config.add("sum", config.replace(r=rank, alpha=rank))
        layer.average_adapter("sum", dict(zip(names, weights, strict=True)), combine_strategy, svd_rank=rank)
        result = layer.loras["sum"]
        return result.scaling * result.delta_w

    return add


# --- mlx-lm ---


class FromMlx(nn.Module):
    """A layer of MLX as PyTorch's, whose parameters are given to the layer at each call."""

    def __init__(self, layer: Any, **tensors: Tensor):
        super().__init__()
        self.layer, self.names = layer, list(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach().clone()))

    def train(self, mode: bool = True) -> FromMlx:
        self.layer.train(mode)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        def call(x: Any, *own: Any) -> Any:
            self.layer.update(dict(zip(self.names, own, strict=True)))
            return self.layer(x)

        return MlxCall.apply(call, x, *(getattr(self, name) for name in self.names))


class MlxCall(torch.autograd.Function):
    """y = function(*inputs) on arrays of MLX, with the gradients of its own `mx.vjp`."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *inputs: Tensor) -> Tensor:
        ctx.function, ctx.inputs = function, [to_mlx(each) for each in inputs]
        return to_torch(function(*ctx.inputs))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        import mlx.core as mx

        _, gradients = mx.vjp(lambda *inputs: [ctx.function(*inputs)], ctx.inputs, [to_mlx(dy)])
        return None, *map(to_torch, gradients)


def to_mlx(tensor: Tensor) -> Any:
    import mlx.core as mx

    dtype = getattr(mx, str(tensor.dtype).removeprefix("torch."))
    exact = tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()
    return mx.array(exact.contiguous().numpy(), dtype=dtype)


def to_torch(array: Any) -> Tensor:
    import mlx.core as mx
    import numpy as np

    exact = array.astype(mx.float32) if array.dtype == mx.bfloat16 else array
    return torch.from_numpy(np.array(exact)).to(getattr(torch, str(array.dtype).rpartition(".")[2]))


def mlx_linear(
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    alpha: float,
    *,
    dropout: float = 0.0,
) -> Any:
    from mlx_lm.tuner.lora import LoRALinear

    layer = LoRALinear.from_base(_mlx_base(W, b), len(A), dropout, alpha / len(A))
    return FromMlx(layer, lora_a=A.T, lora_b=B.T)


def mlx_dora(
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    alpha: float,
    *,
    dropout: float = 0.0,
    use_dora: bool = True,
    magnitude: Tensor | None = None,
) -> Any:
    from mlx_lm.tuner.dora import DoRALinear

    layer = DoRALinear.from_base(_mlx_base(W, b), len(A), dropout, alpha / len(A))
    return FromMlx(layer, lora_a=A.T, lora_b=B.T, m=to_torch(layer.m) if magnitude is None else magnitude)


def _mlx_base(W: Tensor, b: Tensor | None) -> Any:
    import mlx.nn

    linear = mlx.nn.Linear(W.shape[1], W.shape[0], bias=b is not None)
    linear.update({"weight": to_mlx(W)} | ({} if b is None else {"bias": to_mlx(b)}))
    return linear


def mlx_merge(W: Tensor, A: Tensor, B: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    alpha = scale * len(A)
    if magnitude is None:
        wrapped = mlx_linear(W, None, A, B, alpha)
    else:
        wrapped = mlx_dora(W, None, A, B, alpha, magnitude=magnitude)
    wrapped.layer.update({name: to_mlx(getattr(wrapped, name)) for name in wrapped.names})
    return to_torch(wrapped.layer.fuse().weight)


# --- bitsandbytes ---


def bitsandbytes_quantize(W: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(W, blocksize=block_size, quant_type="nf4", compress_statistics=False)
    return packed.reshape(-1), state.absmax


def bitsandbytes_dequantize(packed: Tensor, absmax: Tensor, shape: Sequence[int], block_size: int) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

    code = get_4bit_type("nf4", device=packed.device)
    state = QuantState(absmax, torch.Size(shape), code, block_size, "nf4", torch.float32)
    return dequantize_4bit(packed.reshape(-1, 1), state)


def bitsandbytes_double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight that has these largest values, one for each block of 64."""
    from bitsandbytes.functional import quantize_4bit

    weight = absmax.float().reshape(-1, 1).expand(-1, 64).contiguous()
    state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)[1]
    return state.absmax, state.state2.absmax, state.offset


def bitsandbytes_double_dequantize(codes: Tensor, scales: Tensor, offset: Any) -> Tensor:
    """Dequantize a weight whose codes are all that of 1."""
    from bitsandbytes.functional import QuantState, create_dynamic_map, dequantize_4bit, get_4bit_type

    nested = QuantState(absmax=scales, code=create_dynamic_map(), blocksize=256, dtype=torch.float32)
    shape, code = torch.Size((len(codes), 64)), get_4bit_type("nf4", device=codes.device)
    state = QuantState(codes, shape, code, 64, "nf4", torch.float32, torch.as_tensor(offset), nested)
    return dequantize_4bit(codes.new_full((len(codes) * 32, 1), 0xFF), state)[:, 0]


def bitsandbytes_linear(W: Tensor, b: Tensor | None) -> Any:
    from bitsandbytes.nn import Linear4bit

    options = {"compute_dtype": W.dtype, "compress_statistics": False, "quant_type": "nf4"}
    layer = Linear4bit(W.shape[1], W.shape[0], bias=b is not None, **options).to(W.dtype)
    return filled(layer, weight=W, bias=b).to("cpu")  # quantizes


# --- torchao ---


def torchao_linear(W: Tensor, b: Tensor | None) -> Any:
    nf4_tensor = _torchao()
    weight = nf4_tensor.NF4Tensor.from_tensor(W, 64, min(256, W.numel() // 64))
    return lambda x: nf4_tensor.linear_nf4(x, weight) + (0 if b is None else b)


def torchao_quantize(W: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the codes, and absmax as torchao has it: always double-quantized, to int8."""
    weight = _torchao().NF4Tensor.from_tensor(W, block_size, W.numel() // block_size)
    scales = weight.quantized_scalers, weight.quantization_factor, weight.scaler_block_size
    return weight.quantized_data, weight.dequantize_scalers(*scales)


def torchao_dequantize(packed: Tensor, absmax: Tensor, shape: Sequence[int], block_size: int) -> Tensor:
    """Dequantize a tensor of torchao's with these largest values: as the mean of what is quantized further, 0."""
    nf4_tensor = _torchao()
    like = torch.empty(tuple(shape))
    meta = nf4_tensor.SubclassTensorArgs(like.shape, like.stride(), 0, like.dtype, like.device, False)
    table = nf4_tensor.NF4Tensor.from_tensor(torch.ones(64), 64, 1).nf4
    zeros, n = torch.zeros_like(absmax, dtype=torch.int8), len(absmax)
    weight = nf4_tensor.NF4Tensor(meta, block_size, n, n, zeros, torch.ones(1), absmax, packed, table)
    return weight.get_original_weight()


def _torchao() -> Any:
    try:
        from torchao.quantization.quantize_.workflows.nf4 import nf4_tensor
    except ImportError:  # before 0.15
        from torchao.dtypes import nf4tensor as nf4_tensor
    return nf4_tensor
