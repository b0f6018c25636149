"""A BERT of transformers that gives each word a class: `attach` and `train` take any `nn.Module`.

    loss = -Σ_words log softmax(scores)[class] / number of words      scores (C) of the first token of a word
    F1_c = 2 n_cc / (Σ_j n_cj + Σ_j n_jc)      n_ij words of class i are predicted as class j; macro F1 is their mean

The other tokens of a word, [CLS], [SEP] and the padding have no label [Devlin et al. 2019, BERT §5.3]. The head
`classifier` is trained in full and saved beside A and B, so the adapter is one of PEFT.

    tokenizer = AutoTokenizer.from_pretrained("bert-base-cased")
    model = AutoModelForTokenClassification.from_pretrained("bert-base-cased", id2label={0: "O", 1: "animal"})
    ml.attach(model, ml.LoraConfig(target_modules="all-linear", modules_to_save=["classifier"], task_type="TOKEN_CLS"))
    rows = read_rows("train.jsonl", tokenizer, model)  # a line: {"tokens": ["a", "cat"], "labels": ["O", "animal"]}
    ml.train(model, rows, ml.TrainConfig(learning_rate=1e-3, epochs=3), ml.ProgressBar(), loss=class_loss)
    ml.save_adapter(model, "out")  # ml.load_adapter(model, "out") puts it on a model loaded like this one
    print(measure(model, read_rows("test.jsonl", tokenizer, model)))
    print(predict(model, tokenizer, ["an", "old", "oak"]))

    B  sentences    T  tokens of the longest    C  classes
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from minilora.data import IGNORE_INDEX


class Row(NamedTuple):
    tokens: list[int]
    labels: list[int]  # the class at the first token of each word, else IGNORE_INDEX


def encode(words: Sequence[str], classes: Sequence[int], tokenizer: Any, max_length: int = 512) -> Row:
    """Tokenize a sentence of words, each with the index of its class."""
    found = tokenizer(list(words), is_split_into_words=True, truncation=True, max_length=max_length)
    labels, before = [], None
    for word in found.word_ids():  # None for [CLS] and [SEP]
        labels.append(IGNORE_INDEX if word in (None, before) else classes[word])
        before = word
    return Row(found["input_ids"], labels)


def read_rows(path: str | Path, tokenizer: Any, model: Any) -> list[Row]:
    """Read rows of JSON, one a line."""
    ids = {label: i for i, label in model.config.id2label.items()}
    found = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
    return [encode(fields["tokens"], [ids[label] for label in fields["labels"]], tokenizer) for fields in found]


def padded(rows: Sequence[list[int]], value: int, model: nn.Module) -> Tensor:  # (B, T)
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value).to(next(model.parameters()).device)


def class_scores(model: nn.Module, rows: Sequence[Row]) -> Tensor:  # (B, T, C)
    tokens = padded([row.tokens for row in rows], 0, model)
    mask = padded([[1] * len(row.tokens) for row in rows], 0, model)
    return model(input_ids=tokens, attention_mask=mask).logits


def class_loss(model: nn.Module, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    scores, labels = class_scores(model, rows), padded([row.labels for row in rows], IGNORE_INDEX, model)
    total = F.cross_entropy(scores.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total, (labels != IGNORE_INDEX).sum()


@torch.no_grad()
def predicted_classes(model: nn.Module, row: Row) -> Tensor:
    """Return the class with the highest score of each word, (words)."""
    model.eval()
    is_first = torch.tensor(row.labels) != IGNORE_INDEX
    return class_scores(model, [row])[0].argmax(-1).cpu()[is_first]


def predict(model: Any, tokenizer: Any, words: Sequence[str]) -> list[str]:
    """Return the label of each word."""
    row = encode(words, [0] * len(words), tokenizer)
    return [model.config.id2label[i] for i in predicted_classes(model, row).tolist()]


def measure(model: Any, rows: Sequence[Row]) -> dict[str, float]:
    """Return accuracy and macro F1, the mean over the classes that occur or are predicted."""
    C, found = model.config.num_labels, torch.cat([predicted_classes(model, row) for row in rows])
    classes = torch.tensor([label for row in rows for label in row.labels if label != IGNORE_INDEX])
    n = torch.bincount(C * classes + found, minlength=C * C).view(C, C).double()
    correct, both = n.diag(), n.sum(0) + n.sum(1)
    f1 = (2 * correct / both)[both > 0]
    return {"accuracy": (correct.sum() / n.sum()).item(), "macro_f1": f1.mean().item()}
