"""Classes of words: which token has which class, that any module learns them, and a BERT of transformers with PEFT."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import minilora as ml
from minilora.data import IGNORE_INDEX
from minilora.testing.compare import assert_parity
from recipes import classify_tokens as recipe
from tests.models import perturb_

LABELS = {0: "O", 1: "animal"}
ANIMALS, OTHERS = ["cat", "doggy", "mouse"], ["a", "young", "oak", "sea", "town"]
PIECES = {"doggy": ["dog", "gy"], "young": ["yo", "un", "g"]}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "dog", "##gy", "yo", "##un", "##g", "cat", "mouse", "a", "oak", "sea"]
VOCABULARY += ["town"]
CONFIG = {"r": 3, "lora_alpha": 7, "modules_to_save": ["classifier"], "task_type": "TOKEN_CLS"}


class Encoding(dict):
    def word_ids(self):
        return self["words"]


def tokenizer(words, is_split_into_words, truncation, max_length):
    """A stand-in for one of transformers': pieces of words between [CLS] and [SEP]."""
    tokens, numbers = ["[CLS]"], [None]
    for i, word in enumerate(words):
        pieces = PIECES.get(word, [word])
        tokens += [pieces[0], *(f"##{piece}" for piece in pieces[1:])]
        numbers += [i] * len(pieces)
    tokens, numbers = [*tokens[: max_length - 1], "[SEP]"], [*numbers[: max_length - 1], None]
    return Encoding(input_ids=[VOCABULARY.index(token) for token in tokens], words=numbers)


class Tagger(nn.Module):
    """A model as those of transformers are called: each token sees the mean of its sentence as well."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(id2label=LABELS, num_labels=len(LABELS))
        self.embedding, self.query = nn.Embedding(len(VOCABULARY), 8), nn.Linear(8, 8)
        self.classifier = nn.Linear(8, len(LABELS))

    def forward(self, input_ids, attention_mask):
        x, mask = self.embedding(input_ids), attention_mask.unsqueeze(-1)
        mean = (mask * x).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        return SimpleNamespace(logits=self.classifier(torch.tanh(self.query(x + mean))))


def write_rows(path, count):
    draw, rows = random.Random(count), []
    for _ in range(count):
        words = draw.choices([*ANIMALS, *OTHERS], k=draw.randint(1, 6))
        rows.append({"tokens": words, "labels": [LABELS[word in ANIMALS] for word in words]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def learn(model, tokenizer, folder, **config):
    """Train on rows; the losses, and the measures of held-out rows before and after."""
    rows, held_out = (
        recipe.read_rows(write_rows(folder / f"{count}.jsonl", count), tokenizer, model) for count in (120, 40)
    )
    before, losses = recipe.measure(model, held_out), []
    config = ml.TrainConfig(**{"batch_size": 8, "epochs": 4, **config})
    ml.train(model, rows, config, lambda record: losses.append(record["loss"]), loss=recipe.class_loss)
    return losses, before, recipe.measure(model, held_out)


def test_the_class_of_a_word_is_at_its_first_token():
    words, classes = ["a", "doggy", "young"], [0, 1, 0]
    row = recipe.encode(words, classes, tokenizer)
    assert [VOCABULARY[token] for token in row.tokens] == ["[CLS]", "a", "dog", "##gy", "yo", "##un", "##g", "[SEP]"]
    none = IGNORE_INDEX
    assert row.labels == [none, 0, 1, none, 0, none, none, none]
    assert recipe.encode(words, classes, tokenizer, max_length=5).labels == [none, 0, 1, none, none]


def test_the_loss_of_padded_sentences_is_the_sum_of_their_own():
    model = Tagger().double()
    rows = [recipe.encode(words, [0] * len(words), tokenizer) for words in (["a"], ["young", "cat", "oak"], ["sea"])]
    total, count = recipe.class_loss(model, rows)
    alone = [recipe.class_loss(model, [row]) for row in rows]
    assert_parity(total, sum(loss for loss, _ in alone))
    assert count == sum(number for _, number in alone) == 5


def test_loss_falls_and_a_saved_adapter_has_the_head_and_predicts_the_same(tmp_path):
    model = Tagger()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ml.attach(model, ml.LoraConfig(**CONFIG, target_modules=["query"]))
    losses, before, after = learn(model, tokenizer, tmp_path, learning_rate=0.05)
    assert losses[-1] < 0.5 * losses[0]
    assert min(after.values()) > 0.9 > before["accuracy"]
    ml.save_adapter(model, tmp_path / "out")
    again = Tagger()
    again.load_state_dict(start)
    ml.load_adapter(again, tmp_path / "out")
    words = ["a", "young", "doggy", "mouse"]
    assert recipe.predict(again, tokenizer, words) == recipe.predict(model, tokenizer, words)
    assert recipe.predict(model, tokenizer, words) == ["O", "O", "animal", "animal"]


@pytest.fixture
def bert(tmp_path):
    """A function that loads a BERT with a new head by the seed, and a tokenizer of transformers."""
    transformers = pytest.importorskip("transformers")
    directory = tmp_path / "bert"
    directory.mkdir()
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY))
    theirs = transformers.BertTokenizerFast.from_pretrained(directory)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(VOCABULARY), **sizes)).save_pretrained(directory)

    def load(seed=0):
        torch.manual_seed(seed)
        model = transformers.AutoModelForTokenClassification.from_pretrained(directory, id2label=LABELS)
        return model.eval(), theirs

    return load


@pytest.mark.parity
def test_a_bert_learns_and_peft_and_we_read_each_other_s_files(bert, tmp_path):
    peft = pytest.importorskip("peft")
    ours, theirs_tokenizer = bert()
    words = ["a", "young", "doggy", "mouse"]
    row = recipe.encode(words, [0] * 4, theirs_tokenizer)
    assert row == recipe.encode(words, [0] * 4, tokenizer)
    ml.attach(ours, ml.LoraConfig(**CONFIG))
    losses, _, after = learn(ours, theirs_tokenizer, tmp_path, learning_rate=0.01)
    assert losses[-1] < 0.5 * losses[0]
    assert min(after.values()) > 0.9
    ml.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(bert(seed=1)[0], tmp_path / "ours", is_trainable=True).eval()
    assert theirs.active_peft_config.task_type == "TOKEN_CLS"
    with torch.no_grad():
        assert_parity(recipe.class_scores(ours, [row]), recipe.class_scores(theirs, [row]))
        perturb_(theirs)
        theirs.save_pretrained(tmp_path / "theirs")
        again, _ = bert(seed=1)
        ml.load_adapter(again, tmp_path / "theirs")
        assert_parity(recipe.class_scores(again, [row]), recipe.class_scores(theirs, [row]))
