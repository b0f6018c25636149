"""Chapter 5: the best learning rate for batches of 2, 8 and 32 rows, where all read the same 800 rows once.

    python tutorials/experiments/05_batch.py     writes 05_batch.json; 8 rows are in 05_rates.json

The built-in model has an adapter of rank 8 and s = 2 on all linears, AdamW and the cosine schedule; the loss is that
of its 400 validation rows. Seed 0 only: the script shows a direction.
"""

from __future__ import annotations

from record import write_record

import minilora as ml
from minilora.files import ASSETS
from minilora.runs.evaluate import held_out_loss

TRIED = {2: (-1, 0, 1), 32: (1, 2, 3)}  # rows of a batch -> exponents k of the rates 2^k / 1000


def main() -> None:
    """Run all, and keep each loss as it comes."""
    tokenizer = ml.load_tokenizer("minilora/builtin")
    train, valid = (ml.load_dataset(ASSETS / "data" / f"{split}.jsonl", tokenizer) for split in ("train", "valid"))
    results = []
    for rows, exponents in TRIED.items():
        for k in exponents:
            model = ml.load_model("minilora/builtin", "float32")
            ml.attach(model, ml.LoraConfig(r=8, lora_alpha=16), seed=0)
            steps = 800 // rows
            config = ml.TrainConfig(batch_size=rows, max_steps=steps, learning_rate=2**k / 1000, warmup_steps=0.1)
            ml.train(model, train, config)
            results.append([rows, k, round(held_out_loss(model, valid), 5)])
            columns = ["rows of a batch", "k of the rate 2^k / 1000", "loss"]
            write_record(__file__, results, [0], columns=columns)
            print(*results[-1], flush=True)


if __name__ == "__main__":
    main()
