"""A Llama that gives each text a class: LoRA in the decoder, and a head that is trained in full beside it.

    scores = W h      h (D): the last hidden state of a text, which attends to all of it; W (C, D) ~ N(0, 0.02²)
    loss   = -Σ_texts log softmax(scores)[class] / number of texts
    F1_c   = 2 n_cc / (Σ_j n_cj + Σ_j n_jc)      n_ij texts of class i are predicted as class j; macro F1 is their mean

The head is `score` in `modules_to_save`, and all names are those of transformers' `LlamaForSequenceClassification`. So
the adapter is one of PEFT, which puts it on `AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=C)`.

    tokenizer = ml.load_tokenizer("path/to/model")
    model = Classifier(ml.load_model("path/to/model"), labels=["animal", "plant"])
    ml.attach(model, ml.LoraConfig(modules_to_save=("score",), task_type="SEQ_CLS"))
    rows = read_rows("train.jsonl", tokenizer, model.labels)  # a line: {"text": "a young cat", "label": "animal"}
    ml.train(model, rows, ml.TrainConfig(learning_rate=1e-3, epochs=3), ml.ProgressBar(), loss=class_loss)
    ml.save_adapter(model, "out")  # ml.load_adapter(model, "out") puts it on a model made like this one
    print(measure(model, read_rows("test.jsonl", tokenizer, model.labels)))
    print(predict(model, tokenizer, ["an old oak"]))

    B  texts    N  tokens laid end to end    C  classes    D  hidden_size
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import minilora as ml
from minilora.llama import Documents, Llama


class Row(NamedTuple):
    tokens: list[int]
    label: int = 0  # the index of its class


class Classifier(nn.Module):
    """A decoder with a head that scores the classes."""

    def __init__(self, llama: Llama, labels: Sequence[str], seed: int = 0):
        super().__init__()
        self.name_or_path, self.labels = llama.name_or_path, list(labels)
        self.model = llama.model
        self.score = nn.Linear(llama.config.hidden_size, len(labels), bias=False)
        nn.init.normal_(self.score.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        self.score.to(llama.model.embed_tokens.weight)

    def forward(self, rows: Sequence[Row]) -> Tensor:  # (B, C)
        device, lengths = next(self.parameters()).device, [len(row.tokens) for row in rows]
        tokens = torch.tensor([token for row in rows for token in row.tokens], device=device)
        hidden = self.model(tokens, Documents(lengths))  # (N, D)
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        return self.score(hidden[last])


def class_loss(model: Classifier, rows: Sequence[Row]) -> tuple[Tensor, int]:
    scores = model(rows)
    classes = torch.tensor([row.label for row in rows], device=scores.device)
    return F.cross_entropy(scores.float(), classes, reduction="sum"), len(rows)


def encode(text: str, tokenizer: ml.Tokenizer, max_length: int = 512) -> list[int]:
    """Tokenize a text; a control token in it is plain text."""
    return tokenizer.encode(tokenizer.quote(text))[:max_length]


def read_rows(path: str | Path, tokenizer: ml.Tokenizer, labels: Sequence[str]) -> list[Row]:
    """Read rows of JSON, one a line."""
    found = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
    return [Row(encode(fields["text"], tokenizer), labels.index(fields["label"])) for fields in found]


@torch.no_grad()
def predicted_classes(model: Classifier, rows: Sequence[Row], batch_size: int = 16) -> Tensor:
    """Return the class with the highest score of each row, (rows)."""
    model.eval()
    batches = (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))
    return torch.cat([model(batch).argmax(-1).cpu() for batch in batches])


def predict(model: Classifier, tokenizer: ml.Tokenizer, texts: Iterable[str]) -> list[str]:
    """Return the label of each text."""
    rows = [Row(encode(text, tokenizer)) for text in texts]
    return [model.labels[i] for i in predicted_classes(model, rows).tolist()]


def measure(model: Classifier, rows: Sequence[Row]) -> dict[str, float]:
    """Return accuracy and macro F1, the mean over the classes that occur or are predicted."""
    C, classes = len(model.labels), torch.tensor([row.label for row in rows])
    n = torch.bincount(C * classes + predicted_classes(model, rows), minlength=C * C).view(C, C).double()
    correct, both = n.diag(), n.sum(0) + n.sum(1)
    f1 = (2 * correct / both)[both > 0]
    return {"accuracy": (correct.sum() / n.sum()).item(), "macro_f1": f1.mean().item()}
