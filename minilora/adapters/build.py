"""Build the layers of a new adapter: the wrappers that a `LoraConfig` puts around modules, with start values."""

import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters.config import (
    LoraConfig,
    is_excluded,
    is_target,
    matches,
    select_saved,
    select_targets,
)
from minilora.adapters.initialize import factors_from_weight, gaussian_factors
from minilora.adapters.layers import InitSubtractedAdapter, LoraConv1D, LoraEmbedding, LowRankWrapper, as_matrix
from minilora.adapters.modules_to_save import ModulesToSave, TokenRows, TrainableTokens, TrainedCopy
from minilora.errors import ConfigError, ShapeError, TargetError, in_recipe
from minilora.lora import AdapterWrapper, Linear, LoraAdapter, LoraLinear, dora_norm, initial_factors
from minilora.models.fsdp import whole, whole_weight
from minilora.nf4 import NF4Linear

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LINEAR_WRAPPERS = (LoraLinear, LoraConv1D)
FOREIGN: Mapping[tuple[str, str], type[LowRankWrapper]] = {  # transformers' classes that compute a plain linear
    ("transformers.pytorch_utils", "Conv1D"): LoraConv1D,
    ("transformers.models.falcon.modeling_falcon", "FalconLinear"): LoraLinear,
}


def is_embedding(module: nn.Module | None) -> bool:
    """Return whether a module looks up rows of its weight: PyTorch's, or transformers' that scale them, such as BART's.

    Other subclasses may compute anything.
    """
    kind = type(module)
    is_scaled = kind.__module__.startswith("transformers.") and kind.__name__.endswith("ScaledWordEmbedding")
    return kind is nn.Embedding or is_scaled


def wrapper_class(module: nn.Module | None) -> type[LowRankWrapper] | None:
    """Return the wrapper class for low-rank adapters of a module; None for subclasses, which may compute anything."""
    if type(module) is NF4Linear:
        return LoraLinear
    if module is None or "weight" not in module._parameters:  # computed in each call, as by PyTorch's pruning
        return None
    if type(module) is nn.Linear:
        return LoraLinear
    if isinstance(module, nn.Embedding) and is_embedding(module):
        return LoraEmbedding if module.max_norm is None else None  # which changes the weight in each call
    return FOREIGN.get((type(module).__module__, type(module).__name__))


def adaptable(modules: Mapping[str, Any]) -> dict[str, type[LowRankWrapper]]:
    """Return the wrapper classes of the modules that can have low-rank adapters, by path."""
    kinds = {path: wrapper_class(module) for path, module in modules.items() if path and is_called(path, modules)}
    return {path: kind for path, kind in kinds.items() if kind is not None}


def is_called(path: str, modules: Mapping[str, Any]) -> bool:
    """Return whether a module is called; of a Mamba mixer only `in_proj` is: fused kernels read the other weights."""
    parent, _, name = path.rpartition(".")
    return name == "in_proj" or not {"A_log", "D"} <= modules[parent]._parameters.keys()


def find_targets(modules: Mapping[str, Any], config: LoraConfig, head: str | None) -> list[str]:
    """Return the paths of the modules that get a low-rank adapter (see `select_targets`).

    Warn of linears that "all-linear" leaves out, since an adapter could not replace them: subclasses, which may compute
    anything, those whose weights are read instead of being called, and the matrices in `nn.MultiheadAttention`.
    """
    kinds = adaptable(modules)
    for path, module in modules.items():
        if isinstance(module, CONVOLUTIONS) and is_called(path, modules) and is_target(path, config):
            raise TargetError(f"{path}: is a convolution; {in_recipe('convolutions')}")
    linears = [path for path, kind in kinds.items() if kind in LINEAR_WRAPPERS]
    embeddings = [path for path, kind in kinds.items() if kind not in LINEAR_WRAPPERS]
    chosen = select_targets(linears, config, head, embeddings)
    if config.target_modules == "all-linear":
        _warn_of_others(modules, {*kinds, head}, config)
    return chosen


def _warn_of_others(modules: Mapping[str, Any], known: Collection[str | None], config: LoraConfig) -> None:
    attentions = [path for path, module in modules.items() if isinstance(module, nn.MultiheadAttention)]
    parts = {f"{path}.out_proj" for path in attentions}
    linears = [path for path, module in modules.items() if isinstance(module, nn.Linear) and path not in parts]
    left = [path for path in attentions + linears if path not in known and not is_excluded(path, config)]
    if left:
        kinds = dict(Counter(type(modules[path]).__name__ for path in left))
        warnings.warn(f"all-linear leaves out {kinds}, such as {left[0]!r}", stacklevel=4)


def factor_shapes(module: Any, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of A (r, in) and B (out, r) for a module."""
    if isinstance(module, Linear):
        return (r, module.in_features), (module.out_features, r)
    inner, outer = module.weight.shape
    return (r, inner), (outer, r)


def low_rank_tensors(
    module: nn.Module, path: str, config: LoraConfig, generator: torch.Generator, start: Sequence[Tensor] | None
) -> dict[str, Tensor]:
    """Return the tensors of a new low-rank adapter of one module; `start` are A and B that are given."""
    init, r = config.init_lora_weights, config.rank(path)
    shape_A, shape_B = factor_shapes(module, r)
    is_part_of_weight = init == "pissa"
    if start is not None:
        lora_A, lora_B = start
        if (lora_A.shape, lora_B.shape) != (shape_A, shape_B):
            given = f"A {tuple(lora_A.shape)} and B {tuple(lora_B.shape)}"
            raise ShapeError(f"{path}: start has {given}, need A {tuple(shape_A)} and B {tuple(shape_B)}")
        is_part_of_weight = bool(lora_A.any() and lora_B.any())
    elif is_part_of_weight and not next(module.parameters()).is_meta:
        lora_A, lora_B = factors_from_weight("pissa", matrix_of(module), r, config.scale(path))
    elif init == "gaussian" or is_embedding(module):
        lora_A, lora_B = gaussian_factors(shape_A, shape_B, generator, is_embedding(module))
    else:  # A random and B = 0; also for "pissa" on "meta", where W has no numbers
        lora_A, lora_B = initial_factors(r, shape_A[1], shape_B[0], generator).values()
    tensors = {"lora_A": lora_A, "lora_B": lora_B}
    if is_part_of_weight:
        tensors |= {"start_A": lora_A, "start_B": lora_B}
    if config.lora_bias:
        tensors["lora_bias"] = torch.zeros(shape_B[0])
    if config.bias != "none" and (bias := module._parameters.get("bias")) is not None:
        tensors["bias"] = whole(bias)
    return tensors


def low_rank_layer(
    module: nn.Module, path: str, config: LoraConfig, name: str, tensors: Mapping[str, Tensor]
) -> AdapterWrapper:
    """Wrap a module, with an adapter of these tensors; DoRA's m, if it is not given, is ‖W + s·B A‖."""
    wrapper = wrapper_class(module)
    assert wrapper is not None
    if config.lora_bias and wrapper is LoraEmbedding:
        raise ConfigError(f"{path}: lora_bias is not for embeddings")
    kind = InitSubtractedAdapter if "start_A" in tensors else LoraAdapter
    scale = config.scale(path)
    if config.use_dora and "magnitude" not in tensors:
        new = kind(tensors, scale)
        weight = matrix_of(module)
        lora_A, lora_B = (factor.detach().to(weight.device) for factor in (new.lora_A, new.lora_B))
        norm = torch.ones(len(lora_B)) if weight.is_meta else dora_norm(weight, lora_A, lora_B, scale)
        tensors = {**tensors, "magnitude": norm.to(lora_A.dtype)}
    return wrapper(module, path, {name: kind(tensors, scale, config.lora_dropout)})


def matrix_of(module: nn.Module) -> Tensor:
    """Return the weight of a module as W (out, in), with the rows of all ranks."""
    return as_matrix(module, whole_weight(module))


def build_layers(
    modules: Mapping[str, Any],
    config: LoraConfig,
    name: str,
    tensors: Mapping[str, Mapping[str, Tensor]],
    dtype: torch.dtype,
    embedding: str | None,
) -> dict[str, AdapterWrapper]:
    """Build the wrappers of a new adapter by path: low-rank ones of these tensors, and all else the config trains."""
    full = _trained_copies(modules, config, dtype)
    rows = _token_rows(modules, config, dtype, embedding)
    if twice := sorted(path for path, count in Counter([*tensors, *full, *rows]).items() if count > 1):
        named = "the config names it in two of target_modules, modules_to_save and trainable_token_indices"
        raise TargetError(f"{twice[0]}: an adapter can change a module in one way only, and {named}")
    layers: dict[str, AdapterWrapper] = {
        path: low_rank_layer(modules[path], path, config, name, copy_in_dtype(given, dtype))
        for path, given in tensors.items()
    }
    layers |= {path: TrainableTokens(modules[path], path, {name: adapter}) for path, adapter in rows.items()}
    copies = full | (_trained_biases(modules, layers, full, dtype) if config.bias == "all" else {})
    return layers | {path: ModulesToSave(modules[path], path, {name: copy}) for path, copy in copies.items()}


def copy_in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return copies of tensors, which may be the model's own, in a dtype; empty ones of those on "meta"."""
    return {
        key: torch.empty_like(t, dtype=dtype, device="cpu") if t.is_meta else t.detach().to(dtype, copy=True)
        for key, t in tensors.items()
    }


def _trained_copies(modules: Mapping[str, Any], config: LoraConfig, dtype: torch.dtype) -> dict[str, TrainedCopy]:
    """Return copies of the modules that are trained in full."""
    copies: dict[str, TrainedCopy] = {}
    for path in select_saved([path for path in modules if path], config):
        held = {name: whole(parameter) for name, parameter in modules[path].named_parameters()}
        if not held or not all(parameter.is_floating_point() for parameter in held.values()):
            what = "packed weights, which cannot be trained" if held else "no parameters"
            raise TargetError(f"modules_to_save: {path} has {what}")
        if type(modules[path]).forward is nn.Module.forward:
            raise TargetError(f"modules_to_save: {path} is a container, which has no forward; name what it holds")
        copies[path] = TrainedCopy(modules[path], copy_in_dtype(held, dtype))
    return copies


def _trained_biases(
    modules: Mapping[str, Any], layers: Mapping[str, AdapterWrapper], full: Collection[str], dtype: torch.dtype
) -> dict[str, TrainedCopy]:
    """Return copies, of which the bias is trained, of all modules that have one and that nothing else changes."""
    copies = {}
    for path, module in modules.items():
        bias = module._parameters.get("bias")
        if bias is None:
            continue
        if isinstance(layers.get(path), TrainableTokens):
            raise TargetError(f"{path}: has trainable_token_indices, so its bias cannot be trained; leave one out")
        if path not in layers and not any(f"{path}.".startswith(f"{outer}.") for outer in full):
            copies[path] = TrainedCopy(module, copy_in_dtype({"bias": whole(bias)}, dtype))
    return copies


def _token_rows(
    modules: Mapping[str, Any], config: LoraConfig, dtype: torch.dtype, embedding: str | None
) -> dict[str, TokenRows]:
    """Return the trained rows by path, which start as those of the weight.

    As in PEFT, the modules that are tied to the model's `embedding` share its rows, unless one is given other tokens.
    """
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    if not isinstance(wanted, Mapping):
        if embedding is None:
            raise TargetError("trainable_token_indices: the model does not say which its embedding is; name the module")
        wanted = {embedding: wanted}
    tokens: dict[str, tuple[int, ...]] = {}
    for entry, ids in wanted.items():
        named = [path for path in modules if path and matches((entry,), path)]
        if not (paths := [path for path in named if _has_rows(modules[path])]):
            kinds = sorted({type(modules[path]).__name__ for path in named}) or "no module"
            raise TargetError(f"trainable_token_indices: {entry!r} names {kinds}, need an embedding or a linear head")
        for path in paths:
            size = len(modules[path].weight)
            if bad := [token for token in ids if token >= size]:
                raise TargetError(
                    f"trainable_token_indices: {bad[:5]} are not below {size}, the rows of {path}; "
                    f"for more rows, {in_recipe('new_tokens')}"
                )
            tokens[path] = ids
    starts = copy_in_dtype({path: modules[path].weight.detach()[list(ids)] for path, ids in tokens.items()}, dtype)
    rows = {path: TokenRows(ids, nn.Parameter(starts[path])) for path, ids in tokens.items()}
    for path, ids in tokens.items():
        if not is_embedding(modules[path]) or embedding not in (None, path):
            continue
        weight = modules[path].weight
        tied = [other for other, module in modules.items() if _has_rows(module) and module.weight is weight]
        if all(tokens.get(other, ids) == ids for other in tied):
            shared = [other for other in tied if other not in tokens or type(modules[other]) is nn.Linear]
            rows |= {other: TokenRows(ids, rows[path].rows, is_shared=True) for other in shared}
    return rows


def _has_rows(module: Any) -> bool:
    return is_embedding(module) or type(module) is nn.Linear
