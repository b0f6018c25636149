"""Oracles of a model: the decoder and its operations, in loops in float64 numpy.

N  tokens laid end to end     H  query heads      E  width of a head    D  hidden width   V  vocabulary
M  keys laid end to end       K  key/value heads  R  rotated width      F  width of an MLP

[RMS]   Zhang & Sennrich 2019, Root Mean Square Layer Normalization
[RoPE]  Su et al. 2021, RoFormer: Enhanced Transformer with Rotary Position Embedding
[PI]    Chen et al. 2023, Extending Context Window of Large Language Models via Positional Interpolation
[L31]   llama-models, models/llama3/model.py, apply_scaling
[YaRN]  Peng et al. 2023, YaRN: Efficient Context Window Extension; its ramp is that of the authors' code
[GLU]   Shazeer 2020, GLU Variants Improve Transformer
[GQA]   Ainslie et al. 2023, GQA: Training Generalized Multi-Query Transformer Models
[SWA]   Beltagy et al. 2020, Longformer: The Long-Document Transformer
[GDN]   Yang et al. 2024, Gated Delta Networks: Improving Mamba2 with Delta Rule
[GELU]  Hendrycks & Gimpel 2016, Gaussian Error Linear Units
[Q3]    Qwen Team 2025, Qwen3 Technical Report
[G3]    Gemma Team 2025, Gemma 3 Technical Report; the norms' 1 + w and √D are those of the authors' code
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


# --- the operations of a decoder ---


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """y = weight · x / √(mean(x²) + eps), row by row  [RMS eq. 4].

    Shapes: x (..., D), weight (D) -> (..., D)
    """
    x, weight = _wide(x, weight)
    rows = [weight * row / math.sqrt(math.fsum(row * row) / row.size + eps) for row in x.reshape(-1, x.shape[-1])]
    return np.array(rows).reshape(x.shape)


def swiglu(gate: Array, up: Array) -> Array:
    """y = gate / (1 + exp(-gate)) · up, number by number  [GLU §2].

    Shapes: gate (..., F), up (..., F) -> (..., F)
    """
    gate, up = _wide(gate, up)
    pairs = zip(gate.ravel().tolist(), up.ravel().tolist(), strict=True)
    return np.array([a / (1 + math.exp(-a)) * b for a, b in pairs]).reshape(gate.shape)


def geglu(gate: Array, up: Array) -> Array:
    """y = gate/2 · (1 + tanh(√(2/π) (gate + 0.044715 gate³))) · up, number by number  [GLU §2, GELU §2].

    Shapes: gate (..., F), up (..., F) -> (..., F)
    """
    gate, up = _wide(gate, up)
    pairs = zip(gate.ravel().tolist(), up.ravel().tolist(), strict=True)
    slope = math.sqrt(2 / math.pi)
    return np.array([a / 2 * (1 + math.tanh(slope * (a + 0.044715 * a**3))) * b for a, b in pairs]).reshape(gate.shape)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Coordinates i and i + R/2 as one complex number, multiplied by cos + i·sin; the rest stays  [RoPE eq. 34].

    Shapes: x (N, H, E), cos (N, R/2), sin (N, R/2) -> (N, H, E)
    """
    x, cos, sin = _wide(x, cos, sin)
    half, y = cos.shape[1], x.copy()
    for n in range(len(x)):
        for i in range(half):
            turned = (x[n, :, i] + 1j * x[n, :, i + half]) * complex(cos[n, i], sin[n, i])
            y[n, :, i], y[n, :, i + half] = turned.real, turned.imag
    return y


def causal_attention(
    q: Array, k: Array, v: Array, lengths: Sequence[int], key_lengths: Sequence[int], window: int | None = None
) -> Array:
    """o = Σⱼ exp(q·kⱼ/√E) vⱼ / Σⱼ exp(q·kⱼ/√E), for each query of each head of each document  [GQA §2].

    Query i of a document is at position i + (keys - queries) of it, and j runs over the keys of the same document that
    lie at most at that position and less than `window` before it  [SWA §3.1].

    Shapes: q (N, H, E), k (M, K, E), v (M, K, E), lengths sum N, key_lengths sum M -> (N, H, E)
    """
    q, k, v = _wide(q, k, v)
    output = np.zeros_like(q)
    first_query = first_key = 0
    for length, total in zip(lengths, key_lengths, strict=True):
        for i in range(length):
            position = i + total - length
            seen = [first_key + j for j in range(total) if j <= position and (window is None or position - j < window)]
            for h in range(q.shape[1]):
                reads = h * k.shape[1] // q.shape[1]
                scores = np.array([np.dot(q[first_query + i, h], k[j, reads]) for j in seen]) / math.sqrt(q.shape[2])
                shares = np.exp(scores - scores.max())
                mixed = sum(share * v[j, reads] for share, j in zip(shares, seen, strict=True))
                output[first_query + i, h] = mixed / shares.sum()
        first_query, first_key = first_query + length, first_key + total
    return output


def gated_delta_rule(
    q: Array, k: Array, v: Array, log_decay: Array, beta: Array, lengths: Sequence[int], states: Array
) -> tuple[Array, Array]:
    """S_t = S_(t-1) (α_t (I - β_t k_t k_tᵀ)) + β_t v_t k_tᵀ, o_t = S_t q_t, for each head of each document.

    [GDN eq. 10]; S_0 is in `states`, and α = exp(log_decay).

    Shapes: q (N, K, E), k (N, K, E), v (N, H, F), log_decay (N, H), beta (N, H), states (B, H, F, E)
        -> (N, H, F), (B, H, F, E)
    """
    q, k, v, log_decay, beta, states = _wide(q, k, v, log_decay, beta, states)
    output, last, first = np.zeros_like(v), states.copy(), 0
    for document, length in enumerate(lengths):
        for h in range(v.shape[1]):
            S, reads = states[document, h], h * k.shape[1] // v.shape[1]
            for n in range(first, first + length):
                key = k[n, reads]
                faded = math.exp(log_decay[n, h]) * (np.eye(len(key)) - beta[n, h] * np.outer(key, key))
                S = S @ faded + beta[n, h] * np.outer(v[n, h], key)
                output[n, h] = S @ q[n, reads]
            last[document, h] = S
        first += length
    return output, last


# --- rotary position embedding ---


def rope_frequencies(rope: Any) -> Array:
    """How far each pair of coordinates turns from one position to the next, (⌈R/2⌉).

    Pair i, of wavelength λ = 2π/f where f = θ^(-2i/R)  [RoPE eq. 15]:

        default   f
        linear    f / factor  [PI eq. 4]
        llama3    f where λ < L₀/high; f/factor where λ > L₀/low; between them (1 - t)·f/factor + t·f,
                  t = (L₀/λ - low)/(high - low), L₀ = trained_length  [L31]
        yarn      (1 - γ)·f/factor + γ·f  [YaRN eq. 20]; γ falls linearly from 1 at the last pair that turns beta_fast
                  times in L₀, or at the first pair, to 0 at the first that turns at most beta_slow times

    Args:
        rope: has width (R), theta, kind, scaling and trained_length.
    """
    return np.array([_frequency(rope, i) for i in range((rope.width + 1) // 2)])


def _frequency(rope: Any, i: int) -> float:
    scaling, theta, trained = rope.scaling, rope.theta, rope.trained_length
    plain = float(theta ** (-2 * i / rope.width))
    if rope.kind == "linear":
        return plain / float(scaling["factor"])
    if rope.kind == "yarn":
        turns = [trained * theta ** (-2 * j / rope.width) / (2 * math.pi) for j in range(rope.width)]
        first = max([j for j, n in enumerate(turns) if n >= scaling.get("beta_fast", 32)], default=0)
        last = min([j for j, n in enumerate(turns) if n <= scaling.get("beta_slow", 1)], default=rope.width - 1)
        gamma = (last - i) / (last - first) if first < i < last else float(i <= first)
        return float((1 - gamma) * plain / scaling["factor"] + gamma * plain)
    if rope.kind != "llama3":
        return plain
    wavelength, low, high = 2 * math.pi / plain, scaling["low_freq_factor"], scaling["high_freq_factor"]
    if wavelength < trained / high:
        return plain
    if wavelength > trained / low:
        return plain / float(scaling["factor"])
    t = (trained / wavelength - low) / (high - low)
    return float((1 - t) * plain / scaling["factor"] + t * plain)


# --- a whole decoder ---


def decoder_logits(tensors: Mapping[str, Array], config: Any, tokens: Sequence[int], cos: Array, sin: Array) -> Array:
    """The logits of one document by a Llama, perhaps with biases, or by a Qwen 3, which has norms of q and k  [Q3 §2].

    The head is the embedding if there is none.

    Args:
        tensors: what a checkpoint holds, name -> array.
        config: has num_hidden_layers, head_dim and rms_norm_eps.
        tokens: the document.
        cos, sin: the rotation.

    Shapes: tokens (N), cos (N, R/2), sin (N, R/2) -> (N, V)
    """
    embedding, eps = tensors["model.embed_tokens.weight"], config.rms_norm_eps
    x = np.array([embedding[token] for token in tokens], dtype=np.float64)
    for layer in range(config.num_hidden_layers):
        part = _below(f"model.layers.{layer}.", tensors)
        x = x + _attention(part, config, rms_norm(x, part["input_layernorm.weight"], eps), cos, sin)
        y = rms_norm(x, part["post_attention_layernorm.weight"], eps)
        y = swiglu(_project(part, "mlp.gate_proj", y), _project(part, "mlp.up_proj", y))
        x = x + _project(part, "mlp.down_proj", y)
    return _linear(rms_norm(x, tensors["model.norm.weight"], eps), tensors.get("lm_head.weight", embedding))


def gemma3_logits(
    tensors: Mapping[str, Array], config: Any, tokens: Sequence[int], rotations: Mapping[str, tuple[Array, Array]]
) -> Array:
    """The logits of one document by a text model of Gemma 3  [G3 §2].

    x ← x + norm(attention(norm(x))),  x ← x + norm(mlp(norm(x))),  norms by 1 + w,  x = √D · embedding(token)

    Args:
        tensors: as in `decoder_logits`.
        config: has also layer_types, sliding_window and query_pre_attn_scalar, whose root divides q·k.
        tokens: the document.
        rotations: cos and sin of each type of layer.

    Shapes: tokens (N) -> (N, V)
    """
    embedding, eps = tensors["model.embed_tokens.weight"], config.rms_norm_eps
    tensors = {name: 1 + _wide(tensor)[0] if "norm" in name else tensor for name, tensor in tensors.items()}
    x = math.sqrt(embedding.shape[1]) * np.array([embedding[token] for token in tokens], dtype=np.float64)
    for layer, kind in enumerate(config.layer_types):
        part = _below(f"model.layers.{layer}.", tensors)
        part["self_attn.q_norm.weight"] *= math.sqrt(config.head_dim / config.query_pre_attn_scalar)
        window = config.sliding_window if kind == "sliding_attention" else None
        y = _attention(part, config, rms_norm(x, part["input_layernorm.weight"], eps), *rotations[kind], window)
        x = x + rms_norm(y, part["post_attention_layernorm.weight"], eps)
        y = rms_norm(x, part["pre_feedforward_layernorm.weight"], eps)
        y = geglu(_project(part, "mlp.gate_proj", y), _project(part, "mlp.up_proj", y))
        x = x + rms_norm(_project(part, "mlp.down_proj", y), part["post_feedforward_layernorm.weight"], eps)
    return _linear(rms_norm(x, tensors["model.norm.weight"], eps), tensors.get("lm_head.weight", embedding))


def _attention(
    part: Mapping[str, Array], config: Any, x: Array, cos: Array, sin: Array, window: int | None = None
) -> Array:
    q, k, v = (_project(part, f"self_attn.{name}_proj", x).reshape(len(x), -1, config.head_dim) for name in "qkv")
    if "self_attn.q_norm.weight" in part:
        q = rms_norm(q, part["self_attn.q_norm.weight"], config.rms_norm_eps)
        k = rms_norm(k, part["self_attn.k_norm.weight"], config.rms_norm_eps)
    heads = causal_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, [len(x)], [len(x)], window)
    return _project(part, "self_attn.o_proj", heads.reshape(len(x), -1))


def _below(start: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _project(part: Mapping[str, Array], name: str, x: Array) -> Array:
    return _linear(x, part[f"{name}.weight"], part.get(f"{name}.bias"))


def _linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """y[n, o] = Σᵢ W[o, i] x[n, i] + b[o]: einsum without BLAS."""
    x, weight = _wide(x, weight)
    y: Array = np.einsum("ni,oi->no", x, weight)
    return y if bias is None else y + _wide(bias)[0]


def _wide(*arrays: Array) -> list[Array]:
    return [np.asarray(array, dtype=np.float64) for array in arrays]
