// The update that bfloat16 swallows, in every element with data-explorable="bfloat16". It needs lora.js.

function swallow_update(element) {
  element.innerHTML = `<p><strong>Move the update</strong> until the sum, the dot, jumps to the next number of bfloat16.
    Then move the weight: a small weight keeps the same update that a large one swallows.</p>
    <label for="weight">weight in bfloat16, w = <output></output></label>
    <input type="range" id="weight" min="0.01" max="0.5" step="0.001" value="0.1">
    <label for="change">update Δ = <output></output></label>
    <input type="range" id="change" min="-0.002" max="0.002" step="0.00001" value="0.0002">
    <svg class="line" viewBox="0 0 400 96" role="img" aria-label="Numbers of bfloat16 near w, and the sum w + Δ"></svg>
    <p><output></output></p>`;
  const [weight, change] = element.querySelectorAll("input");
  const [weight_value, change_value, verdict] = element.querySelectorAll("output");
  const round = (number) => bfloat16(Float32Array.of(number))[0];

  const draw = () => {
    const w = round(Number(weight.value));
    const delta = Number(change.value);
    const sum = round(w + delta);
    const spacing = 2 ** (Math.floor(Math.log2(w)) - 7);
    let steps = w;
    for (let i = 0; i < 100; i++) steps = round(steps + delta);

    const at = (number) => 200 + (180 * (number - w)) / 0.0025;
    const near = Array.from({ length: 201 }, (_, i) => round(w + (i - 100) * spacing));
    const ticks = near.filter((number) => Math.abs(number - w) < 0.0026).map((number) => `M${at(number)} 46v20`);
    element.querySelector("svg").innerHTML = `<path class="level" d="${ticks.join("")}"/>
      <path class="axis" d="M10 56H390"/><text x="${at(w)}" y="84" text-anchor="middle">w</text>
      <path class="plus" d="M${at(w)} 30H${at(w + delta)}m0 -6v12"/>
      <text x="${at(w + delta)}" y="16" text-anchor="middle">w + Δ</text>
      <circle class="mark" cx="${at(sum)}" cy="56" r="6"/>`;
    weight_value.textContent = w.toPrecision(4);
    change_value.textContent = delta.toFixed(5);
    const fate = sum === w ? "swallowed: the sum is w again" : `kept, as ${(sum - w).toFixed(5)}`;
    verdict.textContent = `The numbers beside w are ${spacing.toPrecision(3)} away, and Δ is ${fate}. A hundred such
      updates, each rounded, lead to ${steps.toPrecision(4)}; added up first and rounded once, they lead to
      ${round(w + 100 * delta).toPrecision(4)}.`;
  };
  element.addEventListener("input", draw);
  draw();
}

document.querySelectorAll('[data-explorable="bfloat16"]').forEach(swallow_update);
