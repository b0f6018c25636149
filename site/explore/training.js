// A layer that learns, in every element with data-explorable="training": sliders for r, α, η and the size of A's start.
// It needs lora.js.
//
// The adapter learns a wanted change T of W by itself: L = ½ ‖s·B A - T‖². So G = ∂L/∂W = s·B A - T, and then
// dA = s·Bᵀ G and dB = s·G Aᵀ, as in chapter 4. T is 12 x 16, with the singular values 1, 1/2, 1/3, … 1/8.

const TRAINED = { out: 12, in: 16, ranks: 8, steps: 60 };

/** The wanted change: a sum of columns times rows of cosines, which are at right angles to each other. */
function wanted_change() {
  const wave = (k, i, n) => Math.sqrt(2 / n) * Math.cos((Math.PI * k * (i + 0.5)) / n);
  return Float32Array.from({ length: TRAINED.out * TRAINED.in }, (_, at) => {
    const [o, i] = [Math.floor(at / TRAINED.in), at % TRAINED.in];
    let sum = 0;
    for (let k = 1; k <= TRAINED.ranks; k++) sum += (wave(k, o, TRAINED.out) * wave(k, i, TRAINED.in)) / k;
    return sum;
  });
}

/** A as it starts, uniform in ±1/√in, times c. Rows beyond the rank are zero, and with B zero they stay so. */
function first_A(r, c) {
  let seed = 1;
  return Float32Array.from({ length: TRAINED.ranks * TRAINED.in }, (_, at) => {
    seed = (seed * 48271) % 2147483647;
    return at < r * TRAINED.in ? (c * (2 * (seed / 2147483647) - 1)) / Math.sqrt(TRAINED.in) : 0;
  });
}

/** The share of ‖T‖² that is left at the start and after each step, and ‖ΔW‖ after the first step. */
function train_layer({ r, alpha, rate, c, is_adam }) {
  const { out, in: width, ranks } = TRAINED;
  const wanted = wanted_change();
  const scale = alpha / r;
  const A = { value: first_A(r, c) };
  const B = { value: new Float32Array(out * ranks) };
  const delta = () => lora_delta({ lora_A: A.value, lora_B: B.value, scale, r: ranks });
  const left = [1];
  let first = 0;
  for (let step = 1; step <= TRAINED.steps; step++) {
    const G = delta().map((number, at) => number - wanted[at]);
    B.gradient = linear(G, A.value, width).map((number) => scale * number); // s·G Aᵀ
    A.gradient = linear(transpose(B.value, out), transpose(G, out), out).map((number) => scale * number); // s·Bᵀ G
    for (const each of [A, B]) move(each, rate, is_adam ? step : 0);
    const now = delta();
    if (step === 1) first = norm(now);
    left.push((norm(now.map((number, at) => number - wanted[at])) / norm(wanted)) ** 2);
  }
  return { left, first };
}

/** A step of plain gradient descent, or the step of this number of Adam. */
function move(parameter, rate, step) {
  const { value, gradient } = parameter;
  const mean = (parameter.mean ??= new Float64Array(value.length));
  const square = (parameter.square ??= new Float64Array(value.length));
  value.forEach((_, i) => {
    mean[i] = 0.9 * mean[i] + 0.1 * gradient[i];
    square[i] = 0.999 * square[i] + 0.001 * gradient[i] ** 2;
    const root = Math.sqrt(square[i] / (1 - 0.999 ** step)) + 1e-8;
    value[i] -= rate * (step ? mean[i] / (1 - 0.9 ** step) / root : gradient[i]);
  });
}

/** ‖ΔW‖ after the first step by the central equation: ηs²·G AᵀA, and with Adam ηs·sign(G Aᵀ) A. */
function predicted_step({ r, alpha, rate, c, is_adam }) {
  const A = first_A(r, c);
  const scale = alpha / r;
  const seen = linear(wanted_change(), A, TRAINED.in); // -G Aᵀ
  const moved = seen.map((number) => rate * (is_adam ? Math.sign(number) : scale * number));
  return norm(lora_delta({ lora_A: A, lora_B: moved, scale, r: TRAINED.ranks }));
}

function train_by_hand(element) {
  const slider = (name, label, min, max, value) => `<label for="train-${name}">${label} = <output></output></label>
    <input type="range" id="train-${name}" min="${min}" max="${max}" step="1" value="${value}">`;
  element.innerHTML = `<p>One small layer learns a wanted change of rank 8 in ${TRAINED.steps} steps.
    <strong>Predict, then drag:</strong> which rate is the best, and which one is too high? Then find a twin: with Adam,
    take four times α, half of A's start and half of η. What becomes of the curve, and what with SGD?</p>
    <div class="side"><svg class="line" viewBox="0 0 400 210" role="img"></svg>
    <div>${slider("rank", "rank r", 1, TRAINED.ranks, 4)}${slider("alpha", "α", 0, 6, 3)}
    ${slider("rate", "learning rate η", -10, 1, -6)}${slider("start", "size of A's start (1 is the usual)", -3, 3, 0)}
    <fieldset><legend>optimizer</legend>
    <label><input type="radio" name="optimizer" value="adam" checked> Adam</label>
    <label><input type="radio" name="optimizer" value="sgd"> SGD</label></fieldset></div></div>
    <p><output class="verdict"></output></p>`;
  const sliders = [...element.querySelectorAll("input[type=range]")];
  const shown = [...element.querySelectorAll("label output")];
  let before = [];
  let last = "";
  const draw = () => {
    const [r, ...exponents] = sliders.map((input) => Number(input.value));
    const [alpha, rate, c] = exponents.map((exponent) => 2 ** exponent);
    const settings = { r, alpha, rate, c, is_adam: element.querySelector("[value=adam]").checked };
    const { left, first } = train_layer(settings);
    [r, alpha, rate, c].forEach((value, i) => (shown[i].textContent = Number(value.toPrecision(3))));
    const place = (share, step) => `${40 + (350 * step) / TRAINED.steps},${180 - 120 * Math.min(share || 0, 1.35)}`;
    const ended = left.findIndex((share) => !Number.isFinite(share) || share > 1e6);
    const curve = (ended < 0 ? left : left.slice(0, ended)).map(place).join(" ");
    const least = least_left(r);
    element.querySelector("svg").innerHTML = `<path class="axis" d="M40 15V180H390"/>
      <path class="level" stroke-dasharray="4 3" d="M40 ${180 - 120 * least}H390"/>
      <text x="34" y="64" text-anchor="end">1</text><text x="34" y="185" text-anchor="end">0</text>
      <text x="390" y="203" text-anchor="end">step ${TRAINED.steps}</text>
      <text x="44" y="12">what is left: before grey, now blue</text>
      <polyline class="base" points="${before}"/><polyline class="adapter" points="${curve}"/>`;
    const end = ended < 0 ? percent_of(left.at(-1)) : "no finite number";
    const text = `s = ${Number((alpha / r).toPrecision(3))}. After ${TRAINED.steps} steps ${end} is left; rank ${r} cannot
      go below ${percent_of(least)}, the dashed line. The first step moves ΔW by ${first.toPrecision(3)}; the central
      equation predicts ${predicted_step(settings).toPrecision(3)}.`;
    element.querySelector(".verdict").textContent = text;
    element.querySelector("svg").setAttribute("aria-label", text);
    [before, last] = [last, curve];
  };
  element.addEventListener("input", draw);
  draw();
}

/** The share of ‖T‖² in the singular values that a rank leaves out. */
function least_left(r) {
  const squares = Array.from({ length: TRAINED.ranks }, (_, k) => 1 / (k + 1) ** 2);
  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
  return sum(squares.slice(r)) / sum(squares);
}

function percent_of(share) {
  return `${(100 * share).toPrecision(3)} %`;
}

document.querySelectorAll('[data-explorable="training"]').forEach(train_by_hand);
