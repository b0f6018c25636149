"""How `minilora/assets/finetune.json` was chosen: accuracy on the validation rows, mean of three seeds.

    python scripts/choose_settings.py

The test rows are not looked at.
"""

from itertools import product

import minilora as ml
from minilora.files import ASSETS, BUILTIN
from minilora.runs.evaluate import choice_accuracy, find_choices

SEEDS = (0, 1, 2)


def accuracy(rate: float, rows: int, epochs: int, seed: int) -> float:
    """Validation accuracy of one run."""
    tokenizer, model = ml.load_tokenizer(BUILTIN), ml.load_model(BUILTIN)
    train, valid = (ml.load_dataset(ASSETS / "data" / f"{split}.jsonl", tokenizer) for split in ("train", "valid"))
    ml.attach(model, ml.LoraConfig(), seed=seed)
    settings = {"learning_rate": rate, "batch_size": rows, "epochs": epochs, "seed": seed}
    ml.train(model, train, ml.TrainConfig(**settings))
    return choice_accuracy(model, valid, find_choices(train) or [])


if __name__ == "__main__":
    for rate, rows, epochs in product((1e-3, 2e-3, 4e-3), (16, 32), (2, 4)):
        mean = sum(accuracy(rate, rows, epochs, seed) for seed in SEEDS) / len(SEEDS)
        print(f"learning rate {rate:g}, batch size {rows}, {epochs} epochs: {mean:.4f}", flush=True)
