"""Count the numbers and bytes of a model's tensors: of the base, dense or in four bits, and of what is trained.

A base that is sharded over N ranks keeps of each tensor of a block ⌈rows / N⌉ rows; the embedding, the last norm and
the head are whole on every rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from minilora.adapters.config import LoraConfig, select_parameters, select_saved, select_targets
from minilora.llama import Decoder, LlamaConfig
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE

FLOAT32 = 4  # bytes
EMBEDDING_PATH = "model.embed_tokens"
BLOCKS = "model.layers."  # how the names of the blocks' tensors begin
Shapes = dict[str, tuple[int, ...]]
Rows = tuple[int, int]  # of a tensor: how many there are, and bytes of one


def parameter_shapes(config: LlamaConfig, classes: int = 0) -> Shapes:
    """Return the names and shapes of a decoder's parameters, including the head's also where it is tied.

    Its blocks are alike, so only one is built.
    """
    with torch.device("meta"):
        short = Decoder(replace(config, num_hidden_layers=1))
        block = {name: tuple(p.shape) for name, p in short.layers[0].named_parameters()}
    head, size = ("score", classes) if classes else ("lm_head", config.vocab_size)
    shapes: Shapes = {f"{EMBEDDING_PATH}.weight": tuple(short.embed_tokens.weight.shape)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"{BLOCKS}{i}.{name}": shape for name, shape in block.items()}
    return {**shapes, "model.norm.weight": (config.hidden_size,), f"{head}.weight": (size, config.hidden_size)}


def embedding_learns(lora: LoraConfig | None, ranks: Mapping[str, int]) -> bool:
    """Return whether the gradient goes back to the embedding; `ranks` are those of `trained_sizes`."""
    return lora is None or EMBEDDING_PATH in ranks or lora.trainable_token_indices is not None


def trained_sizes(lora: LoraConfig | None, shapes: Shapes, tied: bool) -> tuple[list[int], list[int], dict[str, int]]:
    """Return the sizes of all A and B and of other trained tensors, and path -> rank, 0 for a module's own weight."""
    linears = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    if lora is None:
        own = [math.prod(shape) for name, shape in shapes.items() if not (tied and name == "lm_head.weight")]
        return [], own, dict.fromkeys(linears, 0)
    linears.remove(EMBEDDING_PATH)
    parameters = select_parameters(list(shapes), lora)
    ranks = {path: lora.rank(path) for path in select_targets(linears, lora, linears[-1], [EMBEDDING_PATH], parameters)}
    sizes = {path: (lora.rank(path), *shapes[f"{path}.weight"]) for path in ranks}
    sizes |= {name: (lora.rank(name), *shapes[name]) for name in parameters}
    factors = [r * n for r, *widths in sizes.values() for n in widths]
    outputs = [shapes[f"{path}.weight"][path == EMBEDDING_PATH] for path in ranks]  # (in, out)
    others = outputs * (lora.use_dora + lora.lora_bias)
    parents = {name: {name[: i.start()] for i in re.finditer(r"\.", name)} for name in shapes}
    saved = set(select_saved(sorted(set().union(*parents.values())), lora))
    whole = [name for name, paths in parents.items() if paths & saved]
    adapted = {f"{path}.bias" for path in ranks}
    biases = {name for name in shapes if name.endswith(".bias") and (lora.bias == "all" or name in adapted)}
    others += [math.prod(shapes[name]) for name in {*whole, *(biases if lora.bias != "none" else ())}]
    tokens = lora.trainable_token_indices or ()
    ids = [token for each in tokens.values() for token in each] if isinstance(tokens, Mapping) else tokens
    others += [len(ids) * shapes[f"{EMBEDDING_PATH}.weight"][1]] if ids else []
    return factors, others, ranks | {name.removesuffix(".weight"): 0 for name in whole}


def packed_names(config: LlamaConfig, quantization: QuantizeConfig, shapes: Shapes) -> tuple[set[str], bool]:
    """Return the names of the weights that are in four bits, and whether their absmaxes are quantized again."""
    if entry := config.source.get("quantization_config"):  # a checkpoint that is in four bits already
        quantization = QuantizeConfig("nf4", bool(entry.get("bnb_4bit_use_double_quant")))
    linears = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    linears.remove(EMBEDDING_PATH)
    chosen = {f"{path}.weight" for path in quantization.chosen(linears) if path.startswith(BLOCKS)}
    return chosen, quantization.double_quant


def packed_rows(shape: tuple[int, ...], double_quant: bool) -> list[Rows]:
    """Return the rows of the tensors of a weight in four bits: codes, absmaxes, and with double quantization theirs.

    Codes and absmaxes have the weight's rows if these are whole blocks; all else is flat.

    >>> packed_rows((3, 128), double_quant=False)
    [(3, 64), (3, 8)]
    """
    n, size = math.prod(shape), 1 if double_quant else FLOAT32
    blocks = -(-n // BLOCK_SIZE)
    nested = [(-(-blocks // NESTED_BLOCK_SIZE), FLOAT32), (1, FLOAT32)] if double_quant else []
    if shape[1] % BLOCK_SIZE:
        return [((n + 1) // 2, 1), (blocks, size), *nested]
    return [(shape[0], shape[1] // 2), (shape[0], shape[1] // BLOCK_SIZE * size), *nested]


class BaseBytes(NamedTuple):
    """The bytes of a base's parameters.

    Attributes:
        held: on one rank.
        blocks: of each block as it is gathered, with the rows that fill the last rank's share.
        dense: of the largest weight that is in four bits, once it is dequantized; 0 if there is none.
    """

    held: int
    blocks: list[int]
    dense: int


def base_bytes(
    config: LlamaConfig, quantization: QuantizeConfig, dtype: torch.dtype, shapes: Shapes, shards: int = 1
) -> BaseBytes:
    """Count the bytes of the base's parameters, whose blocks are sharded over N ranks.

    held = Σ_others rows · size + Σ_blocks ⌈rows / N⌉ · size;    a block = N · Σ ⌈rows / N⌉ · size

    where size is that of a row.
    """
    packed, double_quant = packed_names(config, quantization, shapes)
    others, shares = 0, [0] * config.num_hidden_layers
    for name, shape in shapes.items():
        dense = (shape[0], dtype.itemsize * math.prod(shape[1:]))
        rows = packed_rows(shape, double_quant) if name in packed else [dense]
        if name.startswith(BLOCKS):
            shares[int(name.split(".")[2])] += sum(-(-count // shards) * size for count, size in rows)
        elif not (config.tie_word_embeddings and name == "lm_head.weight"):
            others += dense[0] * dense[1]
    largest = max((math.prod(shapes[name]) for name in packed), default=0)
    return BaseBytes(others + sum(shares), [shards * share for share in shares], dtype.itemsize * largest)
