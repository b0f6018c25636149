"""What an adapter puts where, and with which start values a new one: a `LoraConfig` made concrete for a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minilora.adapters.adapted import Adapted, Shape, has_hooks
from minilora.adapters.bases import CONVOLUTIONS, AdapterConv, AdapterConv1D, AdapterEmbedding
from minilora.adapters.config import LoraConfig, matches, select_parameters, select_saved, select_targets
from minilora.adapters.copies import TrainedCopy
from minilora.adapters.decompose import loftq_factors, moved_factors
from minilora.adapters.from_data import Target, data_factors, redistributed
from minilora.adapters.functional import lora_scale
from minilora.adapters.initialize import embedding_factors, initial_factors
from minilora.adapters.layers import AdapterLayer, AdapterLinear
from minilora.adapters.parameters import AdapterParameters, stacked_shapes
from minilora.adapters.tokens import TokenRows
from minilora.errors import ConfigError, TargetError
from minilora.quant.linear import NF4Linear, dense_weight

Factors = tuple[Tensor, Tensor]
LINEARS = (AdapterLinear, AdapterConv1D)
FOREIGN: Mapping[tuple[str, str], type[AdapterLayer]] = {  # transformers' classes that compute a plain linear
    ("transformers.pytorch_utils", "Conv1D"): AdapterConv1D,
    ("transformers.models.falcon.modeling_falcon", "FalconLinear"): AdapterLinear,
}


class Part(NamedTuple):
    """One module's share of an adapter.

    Attributes:
        kind: what is put in the module's place.
        tensors: what its `add` takes, also those that the model holds itself, of which `attach` makes copies.
        base: what takes the place of the module itself, if anything does.
    """

    kind: type[Adapted]
    tensors: dict[str, Tensor]
    base: nn.Module | None = None


def kind_of(module: nn.Module | None) -> type[AdapterLayer] | None:
    """What holds the low-rank adapters of such a module. Subclasses have none: they may compute something else."""
    if type(module) is NF4Linear:
        return AdapterLinear
    if module is None or "weight" not in module._parameters:  # it is made anew in each call, as by PyTorch's pruning
        return None
    if type(module) is nn.Linear:
        return AdapterLinear
    if type(module) is nn.Embedding:
        return AdapterEmbedding if module.max_norm is None else None  # which changes the weight in each call
    if type(module) in CONVOLUTIONS:
        return AdapterConv
    return FOREIGN.get((type(module).__module__, type(module).__name__))


def is_read_by_kernels(path: str, modules: Mapping[str, Any]) -> bool:
    """Is it a part of a Mamba mixer whose weight fused kernels take, without a call that an adapter could answer?"""
    parent, _, name = path.rpartition(".")
    return {"A_log", "D"} <= modules[parent]._parameters.keys() and name != "in_proj"


def targets(modules: Mapping[str, Any], config: LoraConfig, head: str | None) -> list[str]:
    """Paths of the modules that get a low-rank adapter; see `select_targets`."""
    kinds = {path: kind for path, module in modules.items() if path and (kind := kind_of(module)) is not None}
    kinds = {path: kind for path, kind in kinds.items() if not is_read_by_kernels(path, modules)}
    linears = [path for path, kind in kinds.items() if kind in LINEARS]
    others = [path for path, kind in kinds.items() if kind not in LINEARS]
    return select_targets(linears, config, head, others, stacked(modules, config))


def stacked(modules: Mapping[str, Any], config: LoraConfig) -> list[str]:
    """Names of the parameters that `target_parameters` means."""
    held = {path: [name for name, p in module._parameters.items() if p is not None] for path, module in modules.items()}
    names = [f"{path}.{name}".lstrip(".") for path, own in held.items() for name in own]
    return select_parameters(names, config)


def completed(
    modules: Mapping[str, Any], config: LoraConfig, factors: Mapping[str, Part], embedding: str | None
) -> dict[str, Part]:
    """Path -> what an adapter has there, begun from the model's own numbers where they are not those of factors.

    Args:
        modules: all of the model's by path, without those that adapters put there.
        config: of the adapter.
        factors: the parts of low rank.
        embedding: path of the model's input embedding.

    Raises:
        TargetError: an entry of `config` means nothing, or one module would be changed in two ways.
    """
    parts = dict(factors)
    whole = select_saved([path for path in modules if path], config)
    for more in ({path: _whole(path, modules[path]) for path in whole}, _token_parts(modules, config, embedding)):
        if twice := sorted(parts.keys() & more.keys()):
            raise TargetError(f"{twice[0]}: one adapter can change a module in one way only, and this does in two")
        parts |= more
    return _with_biases(modules, parts, config)


def low_rank_part(module: nn.Module, path: str, config: LoraConfig, generator: torch.Generator) -> Part:
    """A new adapter of one layer, with start values that are drawn, or made from its weight.

    Raises:
        ConfigError: such a layer cannot have these start values.
    """
    kind, init, r = kind_of(module), config.init_lora_weights, config.rank(path)
    assert kind is not None
    scale = lora_scale(r, config.alpha(path), config.use_rslora)
    shape_A, shape_B = kind.shapes(module, r)
    base = None
    if config.lora_bias and kind is AdapterEmbedding:
        raise ConfigError(f"{path}: lora_bias is not for embeddings")
    if isinstance(init, str) and next(module.parameters()).is_meta:  # no numbers to make the values from
        lora_A, lora_B = initial_factors(True, shape_A, shape_B, generator)
    elif init == "loftq":
        if type(module) is not nn.Linear:
            raise ConfigError(
                f"{path}: loftq itself makes four bits of a dense linear, found {type(module).__name__}; "
                "leave --quantize out"
            )
        lora_A, lora_B, base = loftq_factors(module.weight, r, scale, bias=module.bias)
    elif is_moved(init):
        if shape_B[1] != r:
            raise ConfigError(f"{path}: init_lora_weights is {init!r}, which there is not for a convolution in groups")
        lora_A, lora_B = moved_factors(str(init), _matrix(kind(module, path)), r, scale, generator)
        lora_A, lora_B = lora_A.view(shape_A), lora_B.view(shape_B)
    elif kind is AdapterEmbedding:
        lora_A, lora_B = embedding_factors(init, shape_A[1], shape_B[0], r, generator)
    else:
        lora_A, lora_B = initial_factors(init, shape_A, shape_B, generator)
    more = {"lora_bias": torch.zeros(shape_B[0])} if config.lora_bias else {}
    return Part(kind, _begun(init, lora_A, lora_B) | more, base)


def data_parts(
    model: nn.Module,
    modules: Mapping[str, Any],
    paths: Sequence[str],
    config: LoraConfig,
    losses: Iterable[Tensor],
    generator: torch.Generator,
) -> tuple[LoraConfig, dict[str, Part]]:
    """A new adapter's parts with start values from data, and the config, whose ranks the data may have changed.

    Raises:
        ConfigError: a layer is no linear, or as `data_factors`.
        TrainingError: as of `data_factors`.
    """
    init = str(config.init_lora_weights)
    found: dict[str, Target] = {}
    layers: dict[str, AdapterLayer] = {}
    for path in paths:
        kind, r = kind_of(modules[path]), config.rank(path)
        if kind is None or kind not in LINEARS:
            raise ConfigError(
                f"{path}: init_lora_weights {init!r} is for linears, found {type(modules[path]).__name__}"
            )
        layer = layers[path] = kind(modules[path], path)
        shape_A, shape_B = layer.shapes(layer.base, r)
        scale = lora_scale(r, config.alpha(path), config.use_rslora)
        found[path] = Target(
            model.get_submodule(path), (shape_B[0], shape_A[1]), functools.partial(_matrix, layer), r, scale
        )
    factors = data_factors(init, model, found, losses, generator)
    if init == "eva":
        config = redistributed(config, {path: len(lora_A) for path, (lora_A, _) in factors.items()})
    return config, {path: Part(type(layers[path]), _begun(init, *pair)) for path, pair in factors.items()}


def _matrix(layer: AdapterLayer) -> Tensor:
    return layer.matrix(dense_weight(layer.base))


def is_moved(init: bool | str) -> bool:
    """Does such an adapter begin with a part of W?"""
    return isinstance(init, str) and (init.startswith("pissa") or init in ("olora", "corda", "lora_ga"))


def _begun(init: bool | str, lora_A: Tensor, lora_B: Tensor) -> dict[str, Tensor]:
    """A and B; those that are a part of W are also their start, which is subtracted."""
    start = {"start_A": lora_A, "start_B": lora_B} if is_moved(init) else {}
    return {"lora_A": lora_A, "lora_B": lora_B, **start}


def tied_modules(modules: Mapping[str, Any], embedding: nn.Module) -> list[str]:
    """Paths of the linears and of other embeddings whose weight is the embedding's."""
    others = {path: module for path, module in modules.items() if type(module) in (nn.Linear, nn.Embedding)}
    return [path for path, own in others.items() if own is not embedding and own.weight is embedding.weight]


def _whole(path: str, module: nn.Module) -> Part:
    found = {name: parameter.detach() for name, parameter in module.named_parameters()}
    if not found or not all(parameter.is_floating_point() for parameter in found.values()):
        what = "packed weights, which cannot be trained" if found else "no parameters"
        raise TargetError(f"modules_to_save: {path} has {what}")
    return Part(TrainedCopy, found)


def parameter_parts(
    modules: Mapping[str, Any], config: LoraConfig, draw: Callable[[Shape, Shape], Sequence[Tensor]]
) -> dict[str, Part]:
    """The parts of `target_parameters`, with the A and B that are drawn for their shapes."""
    parts: dict[str, Part] = {}
    for name in stacked(modules, config):
        path, _, last = name.rpartition(".")
        lora_A, lora_B = draw(*stacked_shapes(modules[path], name, config.rank(name)))
        tensors = {f"{last}.lora_A": lora_A, f"{last}.lora_B": lora_B}
        parts[path] = Part(AdapterParameters, (parts[path].tensors if path in parts else {}) | tensors)
    return parts


def _token_parts(modules: Mapping[str, Any], config: LoraConfig, embedding: str | None) -> dict[str, Part]:
    """Trained rows begin as those of the embedding. What is tied to it has them, too, and no tensors."""
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    if not isinstance(wanted, Mapping):
        if embedding is None:
            raise TargetError("trainable_token_indices: the model does not say which its embedding is; name the module")
        wanted = {embedding: wanted}
    parts = {}
    for entry, ids in wanted.items():
        paths = [path for path, module in modules.items() if matches((entry,), path) and type(module) is nn.Embedding]
        if not paths:
            raise TargetError(f"trainable_token_indices: no embedding is called {entry!r}")
        for path in paths:
            weight = modules[path].weight
            if bad := [token for token in ids if token >= len(weight)]:
                there = f"{len(weight)}, the rows of {path}, which has none for {len(bad)} tokens"
                raise TargetError(f"trainable_token_indices: {bad[:5]} are not below {there}")
            parts[path] = Part(TokenRows, {"ids": torch.tensor(ids), "rows": weight.detach()[list(ids)]})
            parts = {other: Part(TokenRows, {}) for other in tied_modules(modules, modules[path])} | parts
    return parts


def check_places(modules: Mapping[str, nn.Module], layers: Collection[Adapted], parts: Mapping[str, Part]) -> None:
    """Could something there have no effect, or lose one?

    Raises:
        TargetError: a place lies in a module that is trained in full, or is the whole model, a layer is not called as
            its class says, or a weight would be exchanged below another adapter.
    """
    if "" in parts:
        raise TargetError("the model's own parameters, which are in none of its modules, cannot be adapted")
    whole = modules[""]
    if isinstance(whole, nn.DataParallel | nn.parallel.DistributedDataParallel) or "_orig_mod" in whole._modules:
        raise TargetError(
            f"the model is in a {type(whole).__name__}, which its names would tell: adapt it, then wrap it"
        )
    places = [(layer.path, type(layer)) for layer in layers] + [(path, part.kind) for path, part in parts.items()]
    if exchanged := sorted(
        {layer.path for layer in layers} & {path for path, part in parts.items() if part.base is not None}
    ):
        raise TargetError(f"{exchanged[0]}: has an adapter already, so its weight cannot be exchanged")
    copied = {path for path, kind in places if kind is TrainedCopy}
    for path, kind in places:
        if outer := [where for where in copied if path.startswith(f"{where}.")]:
            raise TargetError(
                f"{path}: lies in {outer[0]}, which an adapter trains in full, so one would act without it"
            )
        module = modules[path]
        is_own = has_hooks(module) or "forward" in module.__dict__
        if is_own and path in parts and issubclass(kind, AdapterLayer) and kind is not AdapterEmbedding:
            raise TargetError(f"{path}: has hooks or a forward of its own, which an adapter would pass by; exclude it")


def _with_biases(modules: Mapping[str, Any], parts: dict[str, Part], config: LoraConfig) -> dict[str, Part]:
    """The parts and the biases that are trained, of adapted layers or of all modules; each begins as it is."""
    found, copies = dict(parts), [path for path, part in parts.items() if part.kind is TrainedCopy]
    for path, module in modules.items() if config.bias != "none" else ():
        bias = module._parameters.get("bias")
        if bias is None:
            continue
        if path in parts and parts[path].kind is AdapterParameters:
            raise TargetError(f"{path}: is in target_parameters, so its bias cannot be trained, too")
        if path in parts and parts[path].kind is TokenRows and config.bias == "all":
            raise TargetError(f"{path}: reads the rows of trainable_token_indices, so its bias cannot be trained, too")
        if path in parts and issubclass(parts[path].kind, AdapterLayer):
            found[path] = parts[path]._replace(tensors=parts[path].tensors | {"bias": bias.detach()})
        elif config.bias == "all" and not any(f"{path}.".startswith(f"{copied}.") for copied in copies):
            found[path] = Part(TrainedCopy, {"bias": bias.detach()})
    return found
