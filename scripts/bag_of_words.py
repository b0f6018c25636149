"""What counting words achieves on the built-in data: logistic regression, its L2 penalty chosen on `valid`.

python scripts/bag_of_words.py
"""

import torch
import torch.nn.functional as F
from make_data import CATEGORIES, DATA, normalise, read_rows, row_definition
from torch import Tensor

PENALTIES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # times ‖W‖², beside the mean loss of a row


def count_words(split: str, vocabulary: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Counts of the known words of each row, and the number of its category."""
    rows, labels = read_rows(DATA / f"{split}.jsonl"), list(CATEGORIES.values())
    counts = torch.zeros(len(rows), len(vocabulary))
    for row, count in zip(rows, counts, strict=True):
        for word in normalise(row_definition(row)).split():
            if word in vocabulary:
                count[vocabulary[word]] += 1
    return counts, torch.tensor([labels.index(row["completion"].strip()) for row in rows])


def fit(counts: Tensor, labels: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """argmin over W, b of the mean cross entropy of counts @ W + b, plus penalty · ‖W‖². Convex, so no seed matters."""
    classes = int(labels.max()) + 1
    weight = torch.zeros(counts.size(1), classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(counts @ weight + bias, labels) + penalty * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def main() -> None:
    """Print chance and the accuracy on the three splits."""
    words = {word for row in read_rows(DATA / "train.jsonl") for word in normalise(row_definition(row)).split()}
    vocabulary = {word: i for i, word in enumerate(sorted(words))}
    splits = {split: count_words(split, vocabulary) for split in ("train", "valid", "test")}
    results = []
    for penalty in PENALTIES:
        weight, bias = fit(*splits["train"], penalty)
        accuracy = {
            split: ((counts @ weight + bias).argmax(1) == labels).float().mean().item()
            for split, (counts, labels) in splits.items()
        }
        results.append((accuracy["valid"], penalty, accuracy))
    _, penalty, accuracy = max(results, key=lambda result: result[0])
    print(f"{len(vocabulary):,} words, L2 penalty {penalty:g}, chance {1 / len(CATEGORIES):.3f}")
    print("  ".join(f"{split} {value:.3f}" for split, value in accuracy.items()))


if __name__ == "__main__":
    main()
