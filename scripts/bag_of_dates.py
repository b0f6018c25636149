"""What counting achieves on the dates of make_dates.py: each of the eight digits by its own logistic regression.

python scripts/bag_of_dates.py

The counts are those of numbers and words as wholes, and of single digits.
"""

import re

import torch
from bag_of_words import fit
from make_dates import make_rows
from torch import Tensor

PENALTY = 1e-5  # the smallest of bag_of_words.py


def count(prompts: list[str], vocabulary: dict[str, int]) -> Tensor:
    """Counts of the known words and digits of each prompt."""
    counts = torch.zeros(len(prompts), len(vocabulary))
    for row, prompt in zip(counts, prompts, strict=True):
        for word in words(prompt):
            if word in vocabulary:
                row[vocabulary[word]] += 1
    return counts


def words(prompt: str) -> list[str]:
    return [
        *re.findall(r"\d+|[a-z]+|[./,]", prompt.lower()),
        *(f"digit {digit}" for digit in re.findall(r"\d", prompt)),
    ]


def main() -> None:
    """Print the accuracy of whole answers, and of each digit, for the three sizes."""
    test = make_rows("test")
    for size in (200, 1000, 5000):
        train = make_rows("train")[:size]
        vocabulary = {word: i for i, word in enumerate(sorted({w for row in train for w in words(row["prompt"])}))}
        counts, asked = (count([row["prompt"] for row in rows], vocabulary) for rows in (train, test))
        digits, right = ([re.sub(r"\D", "", row["completion"]) for row in rows] for rows in (train, test))
        hits = []
        for place in range(8):
            weight, bias = fit(counts, torch.tensor([int(answer[place]) for answer in digits]), PENALTY)
            hits.append((asked @ weight + bias).argmax(1) == torch.tensor([int(answer[place]) for answer in right]))
        found = torch.stack(hits)
        each = " ".join(f"{share:.2f}" for share in found.float().mean(1))
        print(f"{size:5,} rows: whole answers {found.all(0).float().mean():.3f}; digits of year, month, day: {each}")


if __name__ == "__main__":
    main()
