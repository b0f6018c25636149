// Eight numbers rounded to NF4 by hand, in every element with data-explorable="nf4". It needs nf4.js.

function round_by_hand(element) {
  const start = [0.32, -0.11, 0.05, -0.48, 0.2, 0.61, -0.27, 0.02];
  const rows = start.map((value, i) => `<div class="number-row">
    <label for="number-${i}">w<sub>${i + 1}</sub></label>
    <input type="range" id="number-${i}" min="-1" max="1" step="0.01" value="${value}">
    <svg viewBox="-1 0 2 1" preserveAspectRatio="none" aria-hidden="true"></svg>
    <output aria-live="off"></output></div>`);
  element.innerHTML = `<p><strong>Drag a number.</strong> The short lines are the sixteen levels: -1 to 1 times the
    absmax, the largest number of the block without its sign. The thick line is the level that is stored and comes
    back. Drag the largest number, and all levels move: an outlier leaves the others only a few.</p>
    ${rows.join("")}<p><output class="bytes"></output></p>`;
  const inputs = [...element.querySelectorAll("input")];
  const draw = () => {
    const weight = Float32Array.from(inputs, (input) => input.value);
    const packed = quantize(weight, LEVELS[4], weight.length);
    const back = dequantize(packed, LEVELS[4], weight.length);
    const absmax = packed.absmax[0];
    const lines = Array.from(LEVELS[4], (level) => `M${level * absmax} 0.25V0.75`).join("");
    inputs.forEach((input, i) => {
      const row = input.closest(".number-row");
      const code = packed.codes[i];
      const bits = code.toString(2).padStart(4, "0");
      row.querySelector("svg").innerHTML = `<path class="level" d="${lines}"/>
        <path class="chosen" d="M${back[i]} 0V1"/>`;
      const way = [weight[i].toFixed(2), `level ${code} = ${bits}`, back[i].toFixed(3)];
      row.querySelector("output").textContent = way.join(" → ");
    });
    const bytes = [0, 2, 4, 6].map((i) => (packed.codes[i] << 4) | packed.codes[i + 1]);
    const error = Math.sqrt(weight.reduce((sum, w, i) => sum + (w - back[i]) ** 2, 0) / weight.length);
    element.querySelector(".bytes").textContent = `Stored: absmax ${absmax.toFixed(2)} and four bytes, in hexadecimal
      ${bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ")}, two numbers in each. The numbers that come
      back are off by ${error.toFixed(3)} (root mean square).`;
  };
  element.addEventListener("input", draw);
  draw();
}

document.querySelectorAll('[data-explorable="nf4"]').forEach(round_by_hand);
