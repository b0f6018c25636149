// A Llama that answers one prompt: minilora/llama.py in JavaScript.
// N tokens, D hidden_size, H query heads, K key/value heads, E head_dim, F intermediate_size, V vocab_size

/** y = weight ∘ x / √(mean(x²) + eps) for each row: x (N, D), weight (D). */
function rms_norm(x, weight, eps) {
  const D = weight.length;
  const y = new Float32Array(x.length);
  for (let from = 0; from < x.length; from += D) {
    const row = x.subarray(from, from + D);
    const mean = row.reduce((sum, number) => sum + number * number, 0) / D;
    row.forEach((number, i) => (y[from + i] = (weight[i] * number) / Math.sqrt(mean + eps)));
  }
  return y;
}

/** Rotate pairs (i, i + E/2) of each head by position · θ^(-2i/E): x (N, heads·E). */
function rotate(x, heads, { head_dim: E, rope_theta }) {
  const y = new Float32Array(x.length);
  for (let from = 0; from < x.length; from += E) {
    const position = Math.floor(from / (heads * E));
    for (let i = 0; i < E / 2; i++) {
      const angle = position / rope_theta ** ((2 * i) / E);
      const [a, b] = [x[from + i], x[from + i + E / 2]];
      y[from + i] = a * Math.cos(angle) - b * Math.sin(angle);
      y[from + i + E / 2] = b * Math.cos(angle) + a * Math.sin(angle);
    }
  }
  return y;
}

/** o = softmax(q kᵀ/√E + mask) v; query head h reads key head ⌊h·K/H⌋: q (N, H·E), k and v (N, K·E). */
function causal_attention(q, k, v, { num_attention_heads: H, num_key_value_heads: K, head_dim: E }) {
  const o = new Float32Array(q.length);
  for (let n = 0; n < q.length / (H * E); n++) {
    for (let h = 0; h < H; h++) {
      const query = q.subarray((n * H + h) * E, (n * H + h + 1) * E);
      const at = (m) => (m * K + Math.floor((h * K) / H)) * E; // where the key and the value of position m begin
      const dot = (m) => query.reduce((sum, number, i) => sum + number * k[at(m) + i], 0);
      const scores = Array.from({ length: n + 1 }, (_, m) => dot(m) / Math.sqrt(E));
      softmax(scores).forEach((share, m) => {
        for (let i = 0; i < E; i++) o[(n * H + h) * E + i] += share * v[at(m) + i];
      });
    }
  }
  return o;
}

/** y = silu(gate) ∘ up,  silu(a) = a · σ(a) */
function swiglu(gate, up) {
  return gate.map((a, i) => (a / (1 + Math.exp(-a))) * up[i]);
}

/** A linear layer, with its adapter if it has one. The input is kept, to be shown. */
function project(layer, x) {
  layer.input = x;
  if (layer.adapter) return lora_linear(x, layer.weight, layer.in_features, layer.adapter);
  return linear(x, layer.weight, layer.in_features);
}

function attention({ q_proj, k_proj, v_proj, o_proj }, x, config) {
  const q = rotate(project(q_proj, x), config.num_attention_heads, config);
  const k = rotate(project(k_proj, x), config.num_key_value_heads, config);
  return project(o_proj, causal_attention(q, k, project(v_proj, x), config));
}

function mlp({ gate_proj, up_proj, down_proj }, x) {
  return project(down_proj, swiglu(project(gate_proj, x), project(up_proj, x)));
}

/** x ← x + attention(rms_norm(x));  x ← x + mlp(rms_norm(x)) */
function block({ input_layernorm, post_attention_layernorm, self_attn, mlp: feed_forward }, x, config) {
  x = add(x, attention(self_attn, rms_norm(x, input_layernorm.weight, config.rms_norm_eps), config));
  return add(x, mlp(feed_forward, rms_norm(x, post_attention_layernorm.weight, config.rms_norm_eps)));
}

/** The logits (V) of the token that comes next; the head is the embedding. */
function logits({ config, embed_tokens, layers, norm }, tokens) {
  const D = config.hidden_size;
  let x = new Float32Array(tokens.length * D);
  tokens.forEach((token, n) => x.set(embed_tokens.weight.subarray(token * D, (token + 1) * D), n * D));
  for (const each of Object.values(layers)) x = block(each, x, config);
  return linear(rms_norm(x.subarray(-D), norm.weight, config.rms_norm_eps), embed_tokens.weight, D);
}

function softmax(numbers) {
  const largest = Math.max(...numbers);
  const exponentials = Array.from(numbers, (number) => Math.exp(number - largest));
  const sum = exponentials.reduce((a, b) => a + b);
  return exponentials.map((each) => each / sum);
}
