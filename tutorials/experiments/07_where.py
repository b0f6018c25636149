"""Where do adapters help most? The same number of parameters on the attention, on the MLPs, and on all linears.

And a smaller number, the same for each, on one kind of linear alone.

    python tutorials/experiments/07_where.py            about 25 minutes on two cores; writes 07_where.json beside it
    python tutorials/experiments/07_where.py --small    a short run for two of them, in some seconds; prints the losses

The built-in model learns to sort definitions. The learning rate of each place is chosen with seed 0 by the loss on the
validation rows; then there are runs with more seeds. What counts is measured on the test rows. A second call goes on
where the first one was stopped.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

from record import asks_for_small, write_record

import minilora as ml
from minilora.files import ASSETS
from minilora.llama import Llama
from minilora.runs.evaluate import choice_accuracy, find_choices, held_out_loss, measure_forgetting

OUT = Path(__file__).with_suffix(".json")
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
PLACES = {"attention": (15, ATTENTION), "MLPs": (10, MLP), "all": (6, [*ATTENTION, *MLP])}  # 84,000 parameters each
RANKS = {"q_proj": 21, "k_proj": 28, "v_proj": 28, "o_proj": 21, "gate_proj": 12, "up_proj": 12, "down_proj": 12}
LINEARS = {name: (r, [name]) for name, r in RANKS.items()}  # 33,600 parameters each
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (0, 1, 2, 3, 4)
GRIDS = ((PLACES, RATES, SEEDS), (LINEARS, (2e-3, 4e-3, 8e-3, 1.6e-2), SEEDS[:3]))
STEPS = 100  # one pass over the training rows

tokenizer = ml.load_tokenizer("minilora/builtin")
train, valid, test = (ml.load_dataset(ASSETS / "data" / f"{s}.jsonl", tokenizer) for s in ("train", "valid", "test"))
general = ml.load_dataset(ASSETS / "data" / "general.jsonl", tokenizer)
choices = find_choices(train) or []


def trained(place: str, rate: float, seed: int, steps: int = STEPS) -> Llama:
    """Return the model with a trained adapter."""
    r, targets = (PLACES | LINEARS)[place]
    model = ml.load_model("minilora/builtin")
    ml.attach(model, ml.LoraConfig(r=r, target_modules=targets), seed=seed)
    settings = ml.TrainConfig(learning_rate=rate, batch_size=16, max_steps=steps, seed=seed)
    ml.train(model, train, settings)
    return model


def measure(place: str, rate: float, seed: int) -> dict[str, Any]:
    """Train an adapter and measure it."""
    model = trained(place, rate, seed)
    forgetting = measure_forgetting(model, general)
    numbers = {
        "valid_loss": held_out_loss(model, valid),
        "loss": held_out_loss(model, test),
        "accuracy": choice_accuracy(model, test, choices),
        "kl": forgetting.kl,
        "general_before": forgetting.before,
        "general_after": forgetting.after,
    }
    key = {"place": place, "rate": rate, "seed": seed, "parameters": ml.count_parameters(model).trainable}
    return key | {name: round(number, 4) for name, number in numbers.items()}


def main() -> None:
    """Run what has not been run yet, and write each result at once."""
    if asks_for_small(__doc__):
        places = ("attention", "MLPs")
        losses = {place: round(held_out_loss(trained(place, 2e-3, 0, steps=30), valid), 3) for place in places}
        print(f"{losses}; the MLPs are ahead: {losses['MLPs'] < losses['attention']}")
        return
    results = json.loads(OUT.read_text())["results"] if OUT.is_file() else []

    def known(place: str, rate: float, seed: int) -> dict[str, Any]:
        for each in results:
            if (each["place"], each["rate"], each["seed"]) == (place, rate, seed):
                return each
        results.append(measure(place, rate, seed))
        write_record(__file__, results, SEEDS, steps=STEPS)
        print(results[-1], flush=True)
        return results[-1]

    for places, rates, seeds in GRIDS:
        tried = {place: [known(place, rate, 0) for rate in rates] for place in places}
        for place, seed in product(places, seeds):
            known(place, min(tried[place], key=lambda each: each["valid_loss"])["rate"], seed)


if __name__ == "__main__":
    main()
