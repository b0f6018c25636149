// A frozen linear layer with a low-rank update: minilora/lora.py in JavaScript.
// Matrices lie row after row in a Float32Array: x is (N, in), a weight is (out, in), A is (r, in), B is (out, r).

/** y = x Wᵀ. Two rows of x and four of W at a time are quick; `out` is a multiple of four. */
function linear(x, weight, in_features) {
  const N = x.length / in_features;
  const out_features = weight.length / in_features;
  const y = new Float32Array(N * out_features);
  for (let n = 0; n < N; n += 2) {
    const next = Math.min(n + 1, N - 1); // of an odd number of rows the last is computed twice
    for (let o = 0; o < out_features; o += 4) {
      let a0 = 0, a1 = 0, a2 = 0, a3 = 0;
      let b0 = 0, b1 = 0, b2 = 0, b3 = 0;
      for (let i = 0; i < in_features; i++) {
        const a = x[n * in_features + i];
        const b = x[next * in_features + i];
        const w0 = weight[o * in_features + i];
        const w1 = weight[(o + 1) * in_features + i];
        const w2 = weight[(o + 2) * in_features + i];
        const w3 = weight[(o + 3) * in_features + i];
        a0 += a * w0;
        a1 += a * w1;
        a2 += a * w2;
        a3 += a * w3;
        b0 += b * w0;
        b1 += b * w1;
        b2 += b * w2;
        b3 += b * w3;
      }
      y.set([a0, a1, a2, a3], n * out_features + o);
      y.set([b0, b1, b2, b3], next * out_features + o);
    }
  }
  return y;
}

/** Δy = (s·x Aᵀ) Bᵀ. B A is never formed: x goes through A first, which leaves r numbers a row. */
function lora_update(x, { lora_A, lora_B, scale, r }) {
  const down = linear(x, lora_A, lora_A.length / r);
  return linear(down.map((number) => scale * number), lora_B, r);
}

/** y = x Wᵀ + (s·x Aᵀ) Bᵀ */
function lora_linear(x, weight, in_features, adapter) {
  return add(linear(x, weight, in_features), lora_update(x, adapter));
}

/** ΔW = s·B A */
function lora_delta({ lora_A, lora_B, scale, r }) {
  return linear(lora_B.map((number) => scale * number), transpose(lora_A, r), r);
}

/** W′ = W + s·B A, rounded once, to bfloat16. */
function merge_weight(weight, adapter) {
  return bfloat16(add(weight, lora_delta(adapter)));
}

/** Round each number to the nearest with 8 significant bits, of two equally near to the even one. */
function bfloat16(numbers) {
  const bits = Uint32Array.from(new Uint32Array(numbers.buffer, numbers.byteOffset, numbers.length));
  for (let i = 0; i < bits.length; i++) bits[i] = (bits[i] + 0x7fff + ((bits[i] >>> 16) & 1)) & 0xffff0000;
  return new Float32Array(bits.buffer);
}

/** The adapter cut to its best `rank`. A and B are packed as a singular value decomposition, the largest first. */
function cut(adapter, rank) {
  return { ...adapter, lora_A: adapter.lora_A.slice().fill(0, (rank * adapter.lora_A.length) / adapter.r) };
}

/** The singular values of ΔW: A has their square roots as the lengths of its rows, and so has B in its columns. */
function singular_values({ lora_A, scale, r }) {
  const width = lora_A.length / r;
  return Array.from({ length: r }, (_, k) => scale * norm(lora_A.subarray(k * width, (k + 1) * width)) ** 2);
}

/** The columns of a matrix as rows. */
function transpose(matrix, rows) {
  const columns = matrix.length / rows;
  return matrix.map((_, i) => matrix[(i % rows) * columns + Math.floor(i / rows)]);
}

/** The length of a vector, ‖x‖. */
function norm(numbers) {
  return Math.sqrt(numbers.reduce((sum, number) => sum + number * number, 0));
}

function add(a, b) {
  const sum = new Float32Array(a.length);
  for (let i = 0; i < a.length; i++) sum[i] = a[i] + b[i];
  return sum;
}
