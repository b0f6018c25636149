// The row that DoRA turns and stretches, in every element with data-explorable="dora". It needs lora.js.

function turn_row(element) {
  element.innerHTML = `<p>w is a row of the frozen weight, and the dashed arrow is what the adapter adds to it, the row of
    s·B A. <strong>Turn up s:</strong> LoRA's row turns and changes its length, DoRA's row only turns.
    <strong>Change m:</strong> DoRA's row is stretched and keeps its direction.</p>
    <div class="side">
    <svg class="plane" viewBox="-3.8 -3.7 9.3 7.4" role="img" aria-label="The rows of W, of LoRA and of DoRA"></svg>
    <div><label for="row-scale">scale s = <output></output></label>
    <input type="range" id="row-scale" min="0" max="1.5" step="0.05" value="1">
    <label for="row-turn">direction of the row of B A = <output></output></label>
    <input type="range" id="row-turn" min="-180" max="180" step="5" value="125">
    <label for="row-magnitude">length of DoRA's row, m = <output></output></label>
    <input type="range" id="row-magnitude" min="0.5" max="3" step="0.05" value="1.5">
    <p><output></output></p></div></div>`;
  const [s, turn, m] = element.querySelectorAll("input");
  const [s_value, turn_value, m_value, verdict] = element.querySelectorAll("output");

  const draw = () => {
    const angle = (Number(turn.value) * Math.PI) / 180;
    const w = [2, 0.6];
    const lora = [w[0] + s.value * 1.6 * Math.cos(angle), w[1] + s.value * 1.6 * Math.sin(angle)];
    const dora = lora.map((part) => (m.value * part) / norm(lora));
    element.querySelector("svg").innerHTML = `<circle class="book" r="${m.value}"/>${arrow([0, 0], w, "base", "w")}
      ${arrow(w, lora, "minus", "")}
      ${arrow([0, 0], lora, "mark", "LoRA", -0.5)}${arrow([0, 0], dora, "adapter", "DoRA", 0.5)}`;
    s_value.textContent = Number(s.value).toFixed(2);
    turn_value.textContent = `${turn.value}°`;
    m_value.textContent = Number(m.value).toFixed(2);
    verdict.textContent = `w: ${measures(w)}. LoRA, w + s·B A: ${measures(lora)}.
      DoRA, m (w + s·B A) / ‖w + s·B A‖: ${measures(dora)}.`;
  };
  element.addEventListener("input", draw);
  draw();
}

function measures([x, y]) {
  return `length ${norm([x, y]).toFixed(2)}, direction ${((Math.atan2(y, x) * 180) / Math.PI).toFixed(0)}°`;
}

/** An arrow with a name beside its tip, so far to its left; in a picture y goes down. */
function arrow([x0, y0], [x, y], kind, name, left = -0.3) {
  const back = Math.atan2(y0 - y, x - x0) + Math.PI;
  const barbs = [back - 0.4, back + 0.4].map((turn) => `M${x} ${-y}l${0.2 * Math.cos(turn)} ${0.2 * Math.sin(turn)}`);
  return `<path class="${kind}" d="M${x0} ${-y0}L${x} ${-y}${barbs.join("")}"/>
    <text x="${x - left * Math.sin(back)}" y="${-y + left * Math.cos(back)}">${name}</text>`;
}

document.querySelectorAll('[data-explorable="dora"]').forEach(turn_row);
