"""The decoder that is fine-tuned: a Llama-style Transformer, read from safetensors files.

    x ← x + attention(rms_norm(x));    x ← x + down(silu(gate(n)) ∘ up(n)),  n = rms_norm(x)

Attribute names are the checkpoint's parameter names (`model.layers.0.self_attn.q_proj.weight`), so
loading needs no table of names. Adapters and 4-bit weights replace the linear layers from outside.
Inside, the documents of a batch are laid end to end as one tensor of N tokens; only `Llama.forward`
knows padding.

    N  tokens laid end to end    B  documents of a batch    T  their padded length
    S  keys laid end to end      H  query heads             K  key/value heads
    D  hidden_size               E  head_dim                R  rotated width of a head (R ≤ E)
    F  intermediate_size         V  vocab_size

    [RMS]   Zhang & Sennrich 2019, Root Mean Square Layer Normalization
    [RoPE]  Su et al. 2021, RoFormer: Enhanced Transformer with Rotary Position Embedding
    [GQA]   Ainslie et al. 2023, GQA: Training Generalized Multi-Query Transformer Models
    [SWA]   Jiang et al. 2023, Mistral 7B
    [GLU]   Shazeer 2020, GLU Variants Improve Transformer
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minilora.definition import definition, to_device
from minilora.errors import ConfigError, FormatError, ShapeError
from minilora.nf4 import NF4Linear

CosSin = tuple[Tensor, Tensor]
BuildBlock = Callable[["LlamaConfig", int], nn.Module]  # (config, index of the layer)
Checkpointing = Literal["none", "mlp", "block"]  # what the backward pass computes again, for memory
SIZES = ("vocab_size", "hidden_size", "intermediate_size")
REQUIRED = (*SIZES, "num_hidden_layers", "num_attention_heads")  # in every `config.json`
LLAMA3 = ("original_max_position_embeddings", "factor", "low_freq_factor", "high_freq_factor")


def rope_frequencies(width: int, theta: float) -> Tensor:
    """Compute the angle by which each pair of a head's numbers rotates per position.

    f_i = θ^(-2i/R)  [RoPE eq. 15], (R/2)
    """
    pairs = torch.arange(0, width, 2, device="cpu").float()  # whatever the default device is
    return 1.0 / theta ** (pairs / width)


def llama3_frequencies(width: int, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    """Compute the frequencies of Llama 3.1 and later, which read further than they were trained.

    f_i ← (1 - ρ) f_i / factor + ρ f_i,  ρ = (L f_i / 2π - low) / (high - low)  [Llama 3.1's code]

    Pairs that turn often in the trained length L keep their f (ρ = 1), slow ones slow down (ρ = 0).
    """
    if not all(isinstance(scaling.get(key), int | float) for key in LLAMA3):
        raise ConfigError(f"rope_scaling: found {dict(scaling)}, need numbers for {LLAMA3}")
    length, factor, low, high = (scaling[key] for key in LLAMA3)
    f = rope_frequencies(width, theta)
    turns = length * f / (2 * math.pi)
    rho = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - rho) * f / factor + rho * f


def llama_frequencies(source: Mapping[str, Any], width: int) -> Tensor:
    """Compute the frequencies that the `config.json` of a Llama asks for."""
    scaling = source.get("rope_scaling") or source.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = scaling.get("rope_theta") or source.get("rope_theta") or 10_000.0
    if kind == "llama3":
        return llama3_frequencies(width, theta, scaling)
    if kind != "default":
        raise ConfigError(f"rope type {kind!r} is not supported; supported are default and llama3")
    return rope_frequencies(width, theta)


@dataclass(frozen=True)
class Rope:
    """The rotary embedding: pair i of a head turns by position · frequencies[i]  [RoPE §3.2]."""

    frequencies: tuple[float, ...]  # (R/2), float32

    def rotation(self, spans: Sequence[range], device: torch.device) -> CosSin:
        """Compute cos and sin of position · frequency, (N, R/2) each, for spans of positions."""
        positions = torch.cat([torch.arange(span.start, span.stop) for span in spans]).float()
        angles = torch.outer(positions, torch.tensor(self.frequencies, dtype=torch.float32))
        angles = to_device(angles, device)
        return angles.cos(), angles.sin()


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a model, by the names of `config.json` where it has them."""

    source: Mapping[str, Any]  # the JSON object that it was read from
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: Any  # a `Rope`, or another class with its `rotation`
    windows: tuple[int | None, ...]  # how far each layer looks back; None: all the way
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> "LlamaConfig":
        """Read a Llama's `config.json`. Other families replace what they read in another way."""
        sizes = {key: source.get(key) for key in REQUIRED}
        if bad := {key: size for key, size in sizes.items() if type(size) is not int or size < 1}:
            raise ConfigError(f"found {bad}, need whole numbers above 0")
        heads, bias = source["num_attention_heads"], bool(source.get("attention_bias"))
        found = {"num_key_value_heads": heads, "head_dim": source["hidden_size"] // heads}
        names = [field.name for field in fields(cls)]
        found |= {name: source[name] for name in names if source.get(name) is not None}
        rope = Rope(tuple(llama_frequencies(source, found["head_dim"]).tolist()))
        windows = (None,) * source["num_hidden_layers"]
        own = {"source": source, "rope": rope, "windows": windows, "qkv_bias": bias}
        return cls(**{**found, **own, "o_bias": bias})


@definition
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide each row by its root mean square, and scale each column.

    y = weight ∘ x / √(mean(x²) + eps)  [RMS eq. 4], rounded before the product if weight is as well

    Shapes: x (..., D), weight (D) -> (..., D)
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * n.to(torch.promote_types(x.dtype, weight.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of the numbers of each head by its token's angles.

    (a, b) ↦ (a cos θ - b sin θ, b cos θ + a sin θ)  [RoPE eq. 34]

    Pairs are (i, i + R/2), as in transformers' checkpoints, not (2i, 2i + 1). Numbers beyond R
    pass unchanged.

    Shapes: x (N, H, E), cos (N, R/2), sin (N, R/2) -> (N, H, E)
    """
    half = cos.size(-1)
    a, b, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


@definition
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int],
    window: int | None = None,
) -> Tensor:
    """Let each query attend to the keys of its own document, up to its own position.

    o = softmax(q kᵀ/√E + mask) v;  query head h reads key head ⌊h·K/H⌋  [GQA §2]

    A document's n queries are those of its last n of m ≥ n positions (with a cache, m > n).
    Position i attends to the positions j with i - window < j ≤ i  [SWA §2].

    Shapes: q (N, H, E), k (S, K, E), v (S, K, E), lengths sum N, key_lengths sum S -> (N, H, E)
    """
    outputs = []
    parts = (q.split(list(lengths)), k.split(list(key_lengths)), v.split(list(key_lengths)))
    for document in zip(*parts, strict=True):
        queries, keys, values = (part.transpose(0, 1) for part in document)  # (H or K, length, E)
        n, m = queries.size(1), keys.size(1)
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        if window is not None:
            mask = mask.triu(m - n - window + 1)
        o = F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], mask, enable_gqa=True
        )
        outputs.append(o[0].transpose(0, 1))
    return torch.cat(outputs)


@definition
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gate one projection with the other: y = silu(gate) ∘ up,  silu(a) = a · σ(a)  [GLU §2].

    Shapes: gate (..., F), up (..., F) -> (..., F)
    """
    return F.silu(gate) * up


@definition
def cross_entropy(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """Sum the cross entropy over rows that all have a label. A sum, so that micro-batches add up.

    L = Σ -log softmax(head(h))[label], in float32 at least

    Shapes: hidden (N, D), labels (N) -> ()
    """
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="sum")


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attends(Protocol):
    """What the tokens of a pass see: the documents of a batch, or in generation a cache."""

    spans: Sequence[range]  # the positions of the tokens of each document

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor: ...


class Documents:
    """Documents laid end to end, each of which attends to itself."""

    def __init__(self, lengths: Sequence[int]):
        self.lengths = [length for length in lengths if length]
        self.spans = [range(length) for length in lengths]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        return causal_attention(q, k, v, self.lengths, self.lengths, window)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        D, E = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.window = E, config.windows[layer]
        self.q_proj = nn.Linear(D, H * E, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, K * E, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, K * E, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * E, D, bias=config.o_bias)

    def heads(self, x: Tensor) -> list[Tensor]:
        """Compute the queries (N, H, E), keys and values (N, K, E) of tokens (N, D)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return [project(x).unflatten(-1, (-1, self.head_dim)) for project in projections]

    def forward(self, x: Tensor, rotation: CosSin, documents: Attends) -> Tensor:
        q, k, v = self.heads(x)
        q = rotate(q, *rotation).to(v.dtype)  # under autocast v has 16 bits, the rotation 32
        k = rotate(k, *rotation).to(v.dtype)
        return self.o_proj(documents.attend(q, k, v, self.window).flatten(1))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, width, bias=bias)
        self.up_proj = nn.Linear(D, width, bias=bias)
        self.down_proj = nn.Linear(width, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, attention: nn.Module, mlp: nn.Module):
        super().__init__()
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotation: CosSin, documents: Attends, checkpointing: Checkpointing
    ) -> Tensor:
        x = x + self.attention_branch(x, rotation, documents)
        if checkpointing == "mlp":
            return x + checkpoint(self.mlp_branch, x, use_reentrant=False)
        return x + self.mlp_branch(x)

    def attention_branch(self, x: Tensor, rotation: CosSin, documents: Attends) -> Tensor:
        return self.self_attn(self.input_layernorm(x), rotation, documents)

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.mlp(self.post_attention_layernorm(x))


def llama_block(config: LlamaConfig, layer: int) -> nn.Module:
    """Build a block of a Llama."""
    return Block(config, Attention(config, layer), MLP(config))


class Decoder(nn.Module):
    """The decoder without its head: tokens laid end to end in, hidden states out."""

    def __init__(self, config: LlamaConfig, build_block: BuildBlock = llama_block):
        super().__init__()
        self.config = config
        zeros = torch.zeros(config.vocab_size, config.hidden_size)  # randn is slow, even on "meta"
        self.embed_tokens = nn.Embedding.from_pretrained(zeros, freeze=False)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(build_block(config, layer) for layer in layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, tokens: Tensor, documents: Attends, checkpointing: Checkpointing = "none"
    ) -> Tensor:
        """Compute the hidden states (N, D) after the last norm, of tokens (N) in `Documents`."""
        x = self.embed_tokens(tokens)
        cos, sin = self.config.rope.rotation(documents.spans, x.device)
        others = ((cos.to(x.dtype), sin.to(x.dtype)), documents, checkpointing)  # besides x
        for block in self.layers:
            if checkpointing == "block":
                x = checkpoint(block, x, *others, use_reentrant=False)
            else:
                x = block(x, *others)
        return self.norm(x)


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig, build_block: BuildBlock = llama_block):
        super().__init__()
        self.config = config
        self.name_or_path = ""
        self.model = Decoder(config, build_block)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:  # transformers' names
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Compute the logits (B, T, V) of right-padded rows (B, T), 0 at padding."""
        tokens, lengths = unpad(input_ids, lengths)
        logits = self.lm_head(self.model(tokens, Documents(lengths)))  # (N, V)
        return pad(logits, lengths, input_ids.size(1))


def unpad(input_ids: Tensor, lengths: Sequence[int] | None) -> tuple[Tensor, list[int]]:
    """Lay the tokens of right-padded rows (B, T) end to end (N); return also the lengths."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not input_ids.numel():
        found = getattr(input_ids, "shape", input_ids)
        raise ShapeError(f"input_ids must be a nonempty tensor (B, T), found {found}")
    B, T = input_ids.shape
    lengths = [T] * B if lengths is None else [int(n) for n in lengths]
    if len(lengths) != B or not all(1 <= n <= T for n in lengths):
        raise ShapeError(f"lengths are {lengths}, need {B} numbers in 1..{T}")
    return torch.cat([row[:n] for row, n in zip(input_ids, lengths, strict=True)]), lengths


def pad(rows: Tensor, lengths: Sequence[int], width: int) -> Tensor:
    """Split rows laid end to end (N, V), and pad each document with 0: (B, width, V)."""
    parts = rows.split(list(lengths))
    return torch.stack([F.pad(part, (0, 0, 0, width - len(part))) for part in parts])


def load_llama(directory: str | Path, dtype: torch.dtype = torch.float32) -> Llama:
    """Read a Llama's directory; `ml.load_model` reads every family."""
    source = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    if (source.get("model_type"), source.get("hidden_act", "silu")) != ("llama", "silu"):
        raise ConfigError(f"{directory}: need a Llama with silu; see `ml.load_model` for others")
    try:
        with torch.device("meta"):
            model = Llama(LlamaConfig.from_dict(source))
    except ConfigError as error:
        raise ConfigError(f"{directory}/config.json: {error}") from error
    files = sorted(Path(directory).glob("model*.safetensors"))
    load_weights(model, (weight for file in files for weight in load_file(file).items()))
    model.name_or_path = str(directory)
    return model.to(dtype).eval()


def load_weights(model: Llama, weights: Iterable[tuple[str, Tensor | NF4Linear]]) -> None:
    """Give a model on "meta" its weights by name; a missing or unknown one is a FormatError."""
    missing = set(dict(model.named_parameters()))
    for name, weight in weights:
        if name not in missing:
            raise FormatError(f"the model has no parameter {name}, or it came twice")
        missing.remove(name)
        assign(model, name, weight)
    if missing:
        raise FormatError(f"weights are missing: {sorted(missing)[:5]}")
    model.tie_weights()


def assign(model: nn.Module, name: str, weight: Tensor | NF4Linear) -> None:
    """Set a parameter. A 4-bit weight comes with its linear, which takes over the bias."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(weight, NF4Linear):
        weight.bias = owner._parameters["bias"]
        model.set_submodule(path, weight)
    else:
        setattr(owner, leaf, nn.Parameter(weight, requires_grad=not isinstance(owner, NF4Linear)))
