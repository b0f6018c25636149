"""The decoder that is fine-tuned: llama, mistral, qwen2, qwen3, smollm3 and phi3 in one readable class.

Attribute names are the checkpoint's parameter names (`model.layers.0.self_attn.q_proj.weight`), so loading needs no
table of names. Nothing here knows that adapters or 4-bit weights exist: they replace the linears from outside.

The trunk works on documents laid end to end (see `ops.py`); padding exists only at the public edge, `Llama.forward`.

    N  tokens laid end to end    D  hidden_size    H  num_attention_heads    K  num_key_value_heads
    E  head_dim                  V  vocab_size     B  sequences of a batch   T  their padded length
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from minilora.errors import ShapeError
from minilora.models import ops
from minilora.models.attention import causal_attention
from minilora.models.cache import KVCache
from minilora.models.config import LlamaConfig
from minilora.models.recompute import Recompute


@dataclass(frozen=True)
class Layout:
    """How long the documents of a batch are, and the rotation (cos, sin) of their tokens, (N, R/2) each: what all
    layers share.
    """

    lengths: list[int]
    rotation: tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """`ops.rms_norm` with its weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention of one layer."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        D, E = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.head_dim, self.widths = layer, E, [H * E, K * E, K * E]
        self.window, self.is_rotated, self.is_fused = config.windows[layer], config.rotated[layer], config.is_fused
        if config.is_fused:
            self.qkv_proj = nn.Linear(D, (H + 2 * K) * E, bias=config.qkv_bias)
        else:
            self.q_proj = nn.Linear(D, H * E, bias=config.qkv_bias)
            self.k_proj = nn.Linear(D, K * E, bias=config.qkv_bias)
            self.v_proj = nn.Linear(D, K * E, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * E, D, bias=config.o_bias)
        self.q_norm = RMSNorm(E, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(E, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, layout: Layout, cache: KVCache | None) -> Tensor:
        if self.is_fused:
            q, k, v = self.qkv_proj(x).split(self.widths, dim=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))  # (N, H, E), (N, K, E), (N, K, E)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.is_rotated:
            q, k = ops.rotate(q, *layout.rotation), ops.rotate(k, *layout.rotation)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast a projection is narrower than norms and angles
        if cache is None:
            heads = causal_attention(q, k, v, layout.lengths, layout.lengths, self.window)
        else:
            heads = cache.attend(self.layer, q, k, v, self.window)
        return self.o_proj(heads.flatten(1))


class MLP(nn.Module):
    """down(silu(gate(x)) ∘ up(x)); phi3 keeps gate and up in one matrix."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.is_fused = config.is_fused
        if config.is_fused:
            self.gate_up_proj = nn.Linear(D, 2 * width, bias=bias)
        else:
            self.gate_proj = nn.Linear(D, width, bias=bias)
            self.up_proj = nn.Linear(D, width, bias=bias)
        self.down_proj = nn.Linear(width, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if self.is_fused else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(ops.swiglu(gate, up))


class Block(nn.Module):
    """x ← x + attention(norm(x)); x ← x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, layout: Layout, cache: KVCache | None, recompute: Recompute) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), layout, cache)
        return x + (_recomputed(self.feed_forward, x) if recompute == "mlp" else self.feed_forward(x))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """The decoder without its head: tokens laid end to end in, hidden states out."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        # Zeros and not the embedding's own start values: drawing those on "meta" loads PyTorch's compiler, 80 MB.
        zeros = torch.zeros(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(zeros, freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, tokens: Tensor, lengths: Sequence[int], cache: KVCache | None = None, recompute: Recompute = "none"
    ) -> Tensor:
        """Hidden states after the last norm.

        `recompute` trades time for memory in training: the backward pass computes the MLPs ("mlp") or whole blocks
        ("block") again instead of keeping what they produced.

        Shapes: tokens (N), lengths sum N -> (N, D)

        Raises:
            ShapeError: the lengths do not add up to N, or one is negative.
        """
        if any(length < 0 for length in lengths) or not sum(lengths) == tokens.numel() > 0:
            raise ShapeError(f"lengths {list(lengths)} do not describe {tokens.numel()} tokens")
        if cache is not None:
            cache.begin(lengths)
        x = self.embed_tokens(tokens)
        layout = self._layout(list(lengths), cache, x)
        for block in self.layers:
            if recompute == "block":
                x = _recomputed(block, x, layout, cache, recompute)
            else:
                x = block(x, layout, cache, recompute)
        if cache is not None:
            cache.end()
        return self.norm(x)

    def _layout(self, lengths: list[int], cache: KVCache | None, x: Tensor) -> Layout:
        past = cache.lengths if cache is not None else [0] * len(lengths)
        spans = [range(first, first + new) for first, new in zip(past, lengths, strict=True) if new]
        cos, sin = (table.to(x.dtype) for table in self.config.rope.rotation(spans, x.device))
        return Layout([len(span) for span in spans], (cos, sin))


class Llama(nn.Module):
    """Trunk and head.

    Args:
        config: which family, which sizes.
        generator: draws the weights from N(0, 0.02²); without one they are to be loaded, and the embedding is 0.
    """

    head, task_type = "lm_head", "CAUSAL_LM"

    def __init__(self, config: LlamaConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.name_or_path = ""
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        for name, parameter in self.named_parameters() if generator is not None else ():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def tie_weights(self) -> None:
        """With `tie_word_embeddings`, make the head's weight the embedding itself."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        """The embedding; transformers' name for it, too."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The head; transformers' name for it, by which "all-linear" knows what to leave alone."""
        return self.lm_head

    def forward(self, input_ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Logits of every token; those of the padding are 0.

        Shapes: input_ids (B, T), lengths B numbers of real tokens in each row, padding to the right -> (B, T, V)

        Raises:
            ShapeError: input_ids is not (B, T) or empty, or a length is not in 1..T.
        """
        tokens, lengths = end_to_end(input_ids, lengths)
        return padded(self.lm_head(self.model(tokens, lengths)), lengths, input_ids.size(1))


def end_to_end(input_ids: Tensor, lengths: Sequence[int] | None) -> tuple[Tensor, list[int]]:
    """The real tokens of right-padded rows, and how many each row has; None: all of them.

    Shapes: input_ids (B, T) -> (N)

    Raises:
        ShapeError: input_ids is not (B, T) or empty, or a length is not in 1..T.
    """
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ShapeError(f"input_ids must be (B, T), neither of them 0, found {tuple(input_ids.shape)}")
    B, T = input_ids.shape
    lengths = [T] * B if lengths is None else [int(n) for n in lengths]
    if len(lengths) != B or not all(1 <= n <= T for n in lengths):
        raise ShapeError(f"lengths {lengths} do not fit input_ids {(B, T)}: need {B} numbers in 1..{T}")
    return torch.cat([row[:n] for row, n in zip(input_ids, lengths, strict=True)]), lengths


def padded(rows: Tensor, lengths: Sequence[int], width: int) -> Tensor:
    """What `end_to_end` laid together in rows of one width again, with 0 as padding.

    Shapes: rows (N, V), lengths B numbers -> (B, width, V)
    """
    batch = pad_sequence(rows.split(list(lengths)), batch_first=True)
    return F.pad(batch, (0, 0, 0, width - batch.size(1)))


def _recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)`, computed again in the backward pass. No random state is kept: there is none to keep."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
