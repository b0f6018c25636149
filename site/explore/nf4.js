// A frozen weight in a few bits, with one absmax for each block of 64 numbers: minilora/nf4.py in JavaScript.

const LEVELS = { // by the number of bits
  8: Float32Array.from({ length: 255 }, (_, i) => (i - 127) / 127), // Int8: even distances
  4: Float32Array.of( // NF4, as published
    -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1),
  3: Float32Array.of( // the same construction, with 8 quantiles of a normal distribution
    -1, -0.5350227355957031, -0.24693143367767334, 0, 0.1833374798297882, 0.38199394941329956, 0.6229857206344604, 1),
  2: Float32Array.of(-1, 0, 0.4358181655406952, 1), // and with 4
};
const BLOCK_SIZE = 64;

/** Divide each block by its absmax. A code is the number of midpoints of neighbouring levels that are below. */
function quantize(weight, levels, block_size = BLOCK_SIZE) {
  const midpoints = levels.slice(1).map((level, i) => Math.fround(level + levels[i]) / 2);
  const codes = new Uint8Array(weight.length);
  const absmax = new Float32Array(Math.ceil(weight.length / block_size));
  for (let b = 0; b < absmax.length; b++) {
    const block = weight.subarray(b * block_size, (b + 1) * block_size);
    for (const w of block) absmax[b] = Math.max(absmax[b], Math.abs(w));
    const reciprocal = Math.fround(1 / Math.max(absmax[b], 1e-38));
    block.forEach((w, i) => (codes[b * block_size + i] = count_below(midpoints, Math.fround(w * reciprocal))));
  }
  return { codes, absmax };
}

/** How many bounds are below x, by halving. */
function count_below(bounds, x) {
  let low = 0;
  let high = bounds.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (bounds[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Look up each number's level and multiply it by its block's absmax. */
function dequantize({ codes, absmax }, levels, block_size = BLOCK_SIZE) {
  const weight = new Float32Array(codes.length);
  for (let i = 0; i < codes.length; i++) weight[i] = levels[codes[i]] * absmax[Math.floor(i / block_size)];
  return weight;
}
