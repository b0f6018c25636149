"""The decoder that is fine-tuned: a Llama-style Transformer, read from safetensors files.

    x ← x + attention(rms_norm(x));    x ← x + down(silu(gate(n)) ∘ up(n)),  n = rms_norm(x)

Attribute names are the checkpoint's parameter names (`model.layers.0.self_attn.q_proj.weight`), so loading needs no
table of names. Adapters and 4-bit weights replace the linear layers from outside. Inside, the documents of a batch are
laid end to end as one tensor of N tokens, and `lengths` says where each ends; only `Llama.forward` knows padding.

    N  tokens laid end to end    B  documents of a batch    T  their padded length    D  hidden_size
    H  query heads               K  key/value heads         E  head_dim               R  rotated width of a head (R ≤ E)
    F  intermediate_size         V  vocab_size              M  keys laid end to end

    [RMS]   Zhang & Sennrich 2019, Root Mean Square Layer Normalization
    [RoPE]  Su et al. 2021, RoFormer: Enhanced Transformer with Rotary Position Embedding
    [GQA]   Ainslie et al. 2023, GQA: Training Generalized Multi-Query Transformer Models
    [SWA]   Jiang et al. 2023, Mistral 7B
    [GLU]   Shazeer 2020, GLU Variants Improve Transformer
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minilora.definition import definition
from minilora.errors import ConfigError, FormatError, ShapeError

CosSin = tuple[Tensor, Tensor]
Checkpointing = Literal["none", "mlp", "block"]  # what the backward pass computes again: nothing, MLPs, whole blocks


@dataclass(frozen=True)
class Rope:
    """The rotary position embedding of a model: pair i of a head turns by position · θ^(-2i/R)  [RoPE eq. 15]."""

    width: int  # R, how many numbers of a head are rotated
    theta: float

    def frequencies(self, length: int) -> Tensor:
        """Return the angle of each pair per position, (R/2); scaled variants depend on the document's `length`."""
        return 1.0 / self.theta ** (torch.arange(0, self.width, 2).float() / self.width)

    def rotation(self, spans: Sequence[range], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos and sin of position · frequency, (N, R/2) each, for a span of positions of each document."""
        angles = [torch.outer(torch.arange(s.start, s.stop).float(), self.frequencies(s.stop)) for s in spans]
        on_device = torch.cat(angles).to(device, non_blocking=device.type == "cuda")
        return on_device.cos(), on_device.sin()


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a model and what distinguishes its family, by the names of `config.json` where it has them."""

    source: Mapping[str, Any]  # the JSON object that it was read from
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: Rope
    windows: tuple[int | None, ...]  # how far each layer looks back; None: all the way
    rotated: tuple[bool, ...]  # whether the q and k of each layer are rotated
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    is_fused: bool = False  # q, k and v are one matrix, and so are gate and up

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> LlamaConfig:
        """Read the `config.json` of a plain Llama; `minilora.models.config` reads those of all families."""
        kind, scaling = source.get("model_type"), source.get("rope_scaling") or source.get("rope_parameters") or {}
        if kind != "llama" or scaling.get("rope_type", scaling.get("type", "default")) != "default":
            raise ConfigError(f"need a Llama without scaling of its rotary embedding, found {kind!r}, {scaling}")
        heads, layers = source["num_attention_heads"], source["num_hidden_layers"]
        defaults = {"num_key_value_heads": heads, "head_dim": source["hidden_size"] // heads}
        given = {field.name: source[field.name] for field in fields(cls) if source.get(field.name) is not None}
        found = {"tie_word_embeddings": False, **defaults, **given}
        rope = Rope(found["head_dim"], scaling.get("rope_theta") or source.get("rope_theta") or 10_000.0)
        return cls(**found, source=source, rope=rope, windows=(None,) * layers, rotated=(True,) * layers)


@definition
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide each row by its root mean square, and scale each column.

    y = weight ∘ x / √(mean(x²) + eps)  [RMS eq. 4], x/√… in float32 at least, rounded before the product with weight

    Shapes: x (..., D), weight (D) -> (..., D)
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of the numbers of each head by its token's angles.

    (a, b) ↦ (a cos θ - b sin θ, b cos θ + a sin θ)  [RoPE eq. 34]

    Pairs are (i, i + R/2), as checkpoints of transformers have them, not (2i, 2i + 1). Numbers beyond R pass unchanged.

    Shapes: x (N, H, E), cos (N, R/2), sin (N, R/2) -> (N, H, E)
    """
    half = cos.size(-1)
    a, b, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


@definition
def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], key_lengths: Sequence[int], window: int | None = None
) -> Tensor:
    """Let each query attend to the keys of its own document, up to and including its own position.

    o = softmax(q kᵀ/√E + mask) v;  query head h reads key head ⌊h·K/H⌋  [GQA §2]

    A document's n queries are those of its last n of m ≥ n positions (with a cache, m > n). Position i attends to the
    positions j with i - window < j ≤ i  [SWA §2].

    Shapes: q (N, H, E), k (M, K, E), v (M, K, E), lengths sum N, key_lengths sum M -> (N, H, E)
    """
    outputs = []
    documents = zip(q.split(list(lengths)), k.split(list(key_lengths)), v.split(list(key_lengths)), strict=True)
    for document in documents:
        queries, keys, values = (part.transpose(0, 1).unsqueeze(0) for part in document)  # (1, H or K, length, E)
        n, m = queries.size(2), keys.size(2)
        visible = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        visible = visible if window is None else visible.triu(m - n - window + 1)
        o = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, enable_gqa=True)
        outputs.append(o.squeeze(0).transpose(0, 1))
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
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        D, E, bias = config.hidden_size, config.head_dim, config.qkv_bias
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.head_dim, self.widths = layer, E, [H * E, K * E, K * E]
        self.window, self.is_rotated, self.is_fused = config.windows[layer], config.rotated[layer], config.is_fused
        if self.is_fused:
            self.qkv_proj = nn.Linear(D, sum(self.widths), bias=bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, width, bias=bias) for width in self.widths)
        self.o_proj = nn.Linear(H * E, D, bias=config.o_bias)
        self.q_norm = RMSNorm(E, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(E, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, documents: list[int], rotation: CosSin, cache: Any) -> Tensor:
        if self.is_fused:
            q, k, v = self.qkv_proj(x).split(self.widths, dim=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))  # (N, H, E), (N, K, E), (N, K, E)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.is_rotated:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast v has 16 bits, norms and rotation 32
        if cache is not None:
            return self.o_proj(cache.attend(self.layer, q, k, v, self.window).flatten(1))
        return self.o_proj(causal_attention(q, k, v, documents, documents, self.window).flatten(1))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.is_fused = config.is_fused
        if self.is_fused:
            self.gate_up_proj = nn.Linear(D, 2 * width, bias=bias)
        else:
            self.gate_proj, self.up_proj = nn.Linear(D, width, bias=bias), nn.Linear(D, width, bias=bias)
        self.down_proj = nn.Linear(width, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if self.is_fused else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(swiglu(gate, up))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(config, layer), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, documents: list[int], rotation: CosSin, cache: Any, checkpointing: str) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), documents, rotation, cache)
        feed_forward = self.feed_forward
        return x + (checkpoint(feed_forward, x, use_reentrant=False) if checkpointing == "mlp" else feed_forward(x))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The decoder without its head: tokens laid end to end in, hidden states out."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        # Zeros, because drawing an embedding's start values on "meta" loads PyTorch's compiler, 80 MB.
        zeros = torch.zeros(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(zeros, freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, tokens: Tensor, lengths: Sequence[int], cache: Any = None, checkpointing: Checkpointing = "none"
    ) -> Tensor:
        """Compute the hidden states after the last norm.

        `checkpointing` trades time for memory in training: the backward pass computes the MLPs ("mlp") or whole blocks
        ("block") again. `cache` holds keys and values of earlier tokens (`minilora.models.generate`).

        Shapes: tokens (N), lengths sum N -> (N, D)
        """
        if any(length < 0 for length in lengths) or not tokens.shape == (sum(lengths),) != (0,):
            raise ShapeError(f"lengths {list(lengths)} do not describe tokens {tuple(tokens.shape)}")
        if cache is not None:
            cache.begin(lengths)
        x = self.embed_tokens(tokens)
        past = cache.lengths if cache is not None else [0] * len(lengths)
        spans = [range(first, first + new) for first, new in zip(past, lengths, strict=True) if new]
        cos, sin = (table.to(x.dtype) for table in self.config.rope.rotation(spans, x.device))
        rest = ([len(span) for span in spans], (cos, sin), cache, checkpointing)
        for block in self.layers:
            x = checkpoint(block, x, *rest, use_reentrant=False) if checkpointing == "block" else block(x, *rest)
        if cache is not None:
            cache.end()
        return self.norm(x)


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, self.name_or_path = config, ""
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:  # these two by transformers' names
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Compute the logits (B, T, V) of right-padded rows (B, T), `lengths` tokens real; 0 at padding."""
        tokens, lengths = unpad(input_ids, lengths)
        return pad(self.lm_head(self.model(tokens, lengths)), lengths, input_ids.size(1))


def unpad(input_ids: Tensor, lengths: Sequence[int] | None) -> tuple[Tensor, list[int]]:
    """Concatenate the real tokens of right-padded rows (B, T); return them (N) and the lengths, T each if None."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not input_ids.numel():
        raise ShapeError(f"input_ids must be a nonempty tensor (B, T), found {getattr(input_ids, 'shape', input_ids)}")
    B, T = input_ids.shape
    lengths = [T] * B if lengths is None else [int(n) for n in lengths]
    if len(lengths) != B or not all(1 <= n <= T for n in lengths):
        raise ShapeError(f"lengths {lengths} do not fit input_ids {(B, T)}: need {B} numbers in 1..{T}")
    return torch.cat([row[:n] for row, n in zip(input_ids, lengths, strict=True)]), lengths


def pad(rows: Tensor, lengths: Sequence[int], width: int) -> Tensor:
    """Split rows laid end to end (N, V) by document, and pad each on the right with 0: (B, width, V)."""
    return torch.stack([F.pad(part, (0, 0, 0, width - len(part))) for part in rows.split(list(lengths))])


def load_llama(directory: str | Path, dtype: torch.dtype = torch.float32) -> Llama:
    """Read a plain Llama: `config.json` and one or several safetensors files, by name and strictly."""
    directory = Path(directory)
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_dict(json.loads((directory / "config.json").read_text(encoding="utf-8"))))
    index, files = directory / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found = {name: t.to(dtype) for file in files for name, t in load_file(directory / Path(file).name).items()}
    if wrong := sorted(found.keys() ^ dict(model.named_parameters())):  # a tied head is the embedding
        raise FormatError(f"{directory}: missing or unexpected tensors: {wrong[:5]}")
    model.load_state_dict(found, strict=False, assign=True)
    model.tie_weights()
    model.name_or_path = str(directory)
    return model.eval()
