// The page: what the controls say, the two models, and what is drawn of them.

const $ = (id) => document.getElementById(id);
const find = (root, path) => path.split(".").reduce((at, part) => (at[part] ??= {}), root);
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 && share > 0 ? 1 : 0)}\u00a0%`;
const TOKENIZER = new Tokenizer(PACKED.tokenizer);
const ANSWERS = PACKED.categories.map((category) => TOKENIZER.encode(category)[0]);
const BASE = load();
const MODEL = load(); // with adapters
const ADAPTERS = Object.entries(PACKED.adapter).map(([path, { lora_A, lora_B, scale }]) => {
  const adapter = { lora_A: unpack(lora_A), lora_B: unpack(lora_B), scale, r: lora_A.shape[0] };
  const [number, block, name] = path.split(".").slice(2); // of model.layers.0.self_attn.q_proj
  const sigma = singular_values(adapter);
  return { number, block, name, adapter, sigma, base: find(BASE, path), layer: find(MODEL, path) };
});
const WEIGHTS = { 16: ADAPTERS.map(({ base }) => base.weight) }; // by the number of bits
let drawn = {}; // what was computed last

/** The numbers of a packed tensor, as float32. */
function unpack({ dtype, data }) {
  const text = atob(data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  if (dtype === "float32") return new Float32Array(bytes.buffer);
  return new Float32Array(Uint32Array.from(new Uint16Array(bytes.buffer), (high) => high << 16).buffer); // bfloat16
}

/** The packed weights as objects in objects, by the parts of their names. */
function load() {
  const root = { model: { config: PACKED.config } };
  for (const [name, tensor] of Object.entries(PACKED.base)) {
    const layer = { weight: unpack(tensor), in_features: tensor.shape.at(-1) };
    Object.assign(find(root, name.replace(".weight", "")), layer);
  }
  return root;
}

function read_controls() {
  const data = new FormData($("controls"));
  return {
    prompt: `Definition: ${data.get("definition").trim()}\nCategory:`,
    factor: Number(data.get("scale")),
    rank: Number(data.get("rank")),
    bits: Number(data.get("bits")),
    where: data.getAll("where"),
    is_merged: data.has("merge"),
    shown: ADAPTERS[data.get("layer")],
    step: Number(data.get("step")),
  };
}

/** Set the weights and the adapters of both models; return how many weights the merge changed. */
function configure({ factor, rank, bits, where, is_merged }) {
  WEIGHTS[bits] ??= WEIGHTS[16].map((weight) => dequantize(quantize(weight, LEVELS[bits]), LEVELS[bits]));
  let changed = 0;
  ADAPTERS.forEach(({ number, block, adapter, base, layer }, i) => {
    base.weight = layer.weight = layer.frozen = WEIGHTS[bits][i];
    layer.is_on = where.includes(number) && where.includes(block);
    layer.update = { ...cut(adapter, rank), scale: layer.is_on ? factor * adapter.scale : 0 };
    layer.adapter = is_merged ? null : layer.update;
    if (is_merged) {
      layer.weight = merge_weight(layer.frozen, layer.update);
      const before = bfloat16(layer.frozen);
      changed = before.reduce((sum, number, at) => sum + (number !== layer.weight[at]), changed);
    }
  });
  return changed;
}

/** Compute and draw everything anew; of the base only what has changed. */
function update() {
  const begin = performance.now();
  const controls = read_controls();
  const tokens = TOKENIZER.encode(controls.prompt);
  const changed = configure(controls);
  const key = `${controls.bits} ${tokens}`;
  const base = drawn.key === key ? drawn.base : logits(BASE.model, tokens);
  drawn = { key, base, adapted: logits(MODEL.model, tokens) };
  draw_answer(base, drawn.adapted);
  draw_values(controls, changed);
  draw_spectra(controls);
  draw_layer(controls);
  draw_tokens(tokens);
  draw_paths(controls);
  drawn.milliseconds = performance.now() - begin;
  $("time").textContent = `The last change took ${drawn.milliseconds.toFixed(0)} ms.`;
}

/** The eight probabilities of each model, and what they mean. */
function draw_answer(base, adapted) {
  const shares = [base, adapted].map((scores) => softmax(ANSWERS.map((token) => scores[token])));
  const best = shares.map((each) => each.indexOf(Math.max(...each)));
  $("bars").innerHTML = PACKED.categories.map((category, i) => {
    const bars = ["base", "adapter"].map((kind, model) => `
      <span class="bar ${kind}" style="--share: ${shares[model][i]}"></span>
      <span class="number ${best[model] === i ? "best" : ""}">${percent(shares[model][i])}</span>`);
    return `<div class="row"><span class="name">${category}</span>${bars.join("")}</div>`;
  }).join("");
  const [before, after] = best.map((i, model) => `${PACKED.categories[i]} (${percent(shares[model][i])})`);
  $("verdict").textContent = `The base says ${before}; with the adapter it is ${after}.`;
  const [p, q] = [base, adapted].map(softmax);
  const [p_all, q_all] = [p, q].map((all) => percent(ANSWERS.reduce((sum, token) => sum + all[token], 0)));
  const kl = p.reduce((sum, each, token) => sum + each * Math.log(each / q[token]), 0);
  const likeliest = TOKENIZER.decode(p.indexOf(Math.max(...p))).trim();
  $("vocabulary").textContent = `The bars compare eight words of 2,048 tokens. The base would rather go on with
    “${likeliest}”: it gives all eight together ${p_all}, and with the adapter they have ${q_all}. The KL between the two
    is ${kl.toFixed(2)} nats on this prompt; the curves have it on other text.`;
}

/** What the controls say in numbers, and the measured curves with a mark where one stands. */
function draw_values({ factor, rank, bits }, changed) {
  const { scale, rank: ranks, bits: codes, book } = PACKED.curves;
  const total = WEIGHTS[16].reduce((sum, weight) => sum + weight.length, 0);
  $("scale-value").textContent = `${factor.toFixed(2)} (s = ${(factor * ADAPTERS[0].adapter.scale).toFixed(1)})`;
  $("rank-value").textContent = rank;
  const counts = [changed, total].map((count) => count.toLocaleString("en"));
  $("merge-value").textContent = `${counts.join(" of ")} weights have changed: ${percent(changed / total)}.`;
  draw_curves($("scale-curve"), scale, factor, (at) => at / 2, book);
  draw_curves($("rank-curve"), ranks, rank, (at) => (at - 1) / 15);
  draw_curves($("bits-curve"), codes, bits, (at) => codes.at.indexOf(at) / 4);
}

/** Accuracy and KL over what a control says; a line stands where the control is. */
function draw_curves(svg, { at, adapter, bare = [] }, x, place, book = { at: [], adapter: [] }) {
  const across = (value) => 36 + 300 * place(value);
  const next = Math.max(1, at.findIndex((value) => place(value) >= place(x)));
  const way = (place(x) - place(at[next - 1])) / (place(at[next]) - place(at[next - 1]));
  const here = [0, 1].map((i) => adapter[next - 1][i] + way * (adapter[next][i] - adapter[next - 1][i]));
  const panels = ["accuracy", "KL to the base, nats"].map((name, i) => {
    const top = i === 0 ? 1 : Math.max(...adapter.map((pair) => pair[1]));
    const down = (value) => 82 - (60 * value) / top;
    const points = (pairs, places = at) => pairs.map((pair, j) => `${across(places[j])},${down(pair[i])}`).join(" ");
    return `<g transform="translate(0 ${i * 92})"><text x="36" y="12">${name}</text>
      <text x="30" y="27" text-anchor="end">${top.toFixed(i)}</text><text x="30" y="86" text-anchor="end">0</text>
      <path class="axis" d="M36 22V82H336"/><polyline class="base" points="${points(bare)}"/>
      <polyline class="book" points="${points(book.adapter, book.at)}"/>
      <polyline class="adapter" points="${points(adapter)}"/><path class="mark" d="M${across(x)} 20V82"/>
      <g class="mark" transform="translate(${across(x)} ${down(here[i])})"><circle r="4.5"/>
      <text x="8" y="${here[i] > top / 2 ? 16 : -6}">${here[i].toFixed(2)}</text></g></g>`;
  });
  svg.innerHTML = panels.join("");
  svg.setAttribute("aria-label", `Measured: accuracy ${here[0].toFixed(2)}, KL ${here[1].toFixed(2)} nats`);
}

/** The singular values of all ΔW, a row of cells for each layer; pale where none acts. A click chooses a cell. */
function draw_spectra({ rank, shown }) {
  const largest = Math.max(...ADAPTERS.map(({ sigma }) => sigma[0]));
  const cells = ADAPTERS.map(({ sigma, layer }, i) => `<div class="${layer === shown.layer ? "cell chosen" : "cell"}"
    onclick="$('layer').selectedIndex = ${i}; update()">${bars(sigma, largest, layer.is_on ? rank : 0, 0)}</div>`);
  $("spectra").innerHTML = cells.join("");
}

/** W and ΔW of the chosen layer as pictures, and the singular values of ΔW. */
function draw_layer({ rank, shown: { layer: { frozen, update, in_features }, adapter, sigma } }) {
  const delta = lora_delta(update);
  const largest = (3 * norm(frozen)) / Math.sqrt(frozen.length);
  draw_matrix($("frozen"), frozen, in_features, largest);
  draw_matrix($("delta"), delta, in_features, largest / 5);
  const scaled = sigma.map((value) => (value * update.scale) / adapter.scale);
  $("spectrum").innerHTML = bars(scaled, 2 * sigma[0], rank, 0);
  $("spectrum-value").textContent = `Its singular values. Rank ${rank} keeps
    ${percent((norm(sigma.slice(0, rank)) / norm(sigma)) ** 2)} of the energy ‖ΔW‖²; ‖ΔW‖ is
    ${percent(norm(delta) / norm(frozen))} of ‖W‖.`;
}

/** A matrix as a picture with a pixel for each number: blue above zero, orange below, on any ground. */
function draw_matrix(canvas, numbers, width, largest) {
  Object.assign(canvas, { width, height: numbers.length / width });
  const image = new ImageData(canvas.width, canvas.height);
  for (let i = 0; i < numbers.length; i++) {
    image.data.set(numbers[i] > 0 ? [50, 120, 235] : [225, 105, 25], 4 * i);
    image.data[4 * i + 3] = (255 * Math.abs(numbers[i])) / largest;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Numbers as bars, from `floor` to 1 times the largest; those from `kept` on are pale. */
function bars(numbers, largest, kept = numbers.length, floor = -1) {
  const paths = { plus: "", minus: "", off: "" };
  numbers.forEach((number, i) => {
    paths[i >= kept ? "off" : number > 0 ? "plus" : "minus"] += `M${i + 0.5} 0v${(-number / largest).toFixed(3)}`;
  });
  const drawings = Object.entries(paths).map(([kind, d]) => `<path class="${kind}" d="${d}"/>`);
  const box = `0 -1 ${numbers.length} ${1 - floor}`;
  return `<svg class="bars" viewBox="${box}" preserveAspectRatio="none" aria-hidden="true">${drawings.join("")}</svg>`;
}

/** The tokens of the prompt as buttons, of which the last is chosen at first. */
function draw_tokens(tokens) {
  if ($("tokens").dataset.tokens === String(tokens)) return;
  $("tokens").dataset.tokens = tokens;
  $("tokens").replaceChildren(...tokens.map((token, i) => {
    const label = document.createElement("label");
    const checked = i === tokens.length - 1 ? "checked" : "";
    label.innerHTML = `<input type="radio" name="token" value="${i}" ${checked}><span></span>`;
    label.lastChild.textContent = TOKENIZER.decode(token).replace("\n", "↵");
    return label;
  }));
}

/** What the two paths through the chosen layer make of the chosen token, up to the chosen step. */
function draw_paths({ shown: { layer }, step }) {
  const width = layer.in_features;
  const token = Number($("tokens").querySelector(":checked").value);
  const x = layer.input.subarray(token * width, (token + 1) * width);
  const Wx = linear(x, layer.frozen, width);
  const Ax = linear(x, layer.update.lora_A, width);
  const BAx = lora_update(x, layer.update);
  const y = add(Wx, BAx);
  const largest = (numbers) => numbers.reduce((most, number) => Math.max(most, Math.abs(number)), 1e-9);
  const common = Math.max(largest(Wx), largest(y));
  const scales = [largest(x), common, largest(Ax), common, common];
  [x, Wx, Ax, BAx, y].forEach((numbers, i) => {
    $("paths").children[i].hidden = i >= step;
    $("paths").children[i].querySelector("b").textContent = numbers.length;
    $("paths").children[i].querySelector("div").innerHTML = bars(numbers, scales[i]);
  });
}

for (const { category, definition } of PACKED.examples) {
  $("example").add(new Option(`${category}: ${definition}`, definition));
}
ADAPTERS.forEach(({ number, name }, i) => $("layer").add(new Option(`layer ${number}, ${name}`, i)));
$("layer").options[34].defaultSelected = true;
$("example").addEventListener("input", () => ($("definition").value = $("example").value));
for (const name of ["input", "reset"]) $("controls").addEventListener(name, () => requestAnimationFrame(update));
update();
