"""Make the built-in instruction set, the pretraining text that must not know it, and general text, from WordNet 3.0.

    python scripts/make_data.py --wordnet DIR        # DIR contains data.noun, data.verb, data.adj and data.adv

A row asks for the category of a noun's definition; the answer is the WordNet lexicographer file that holds the noun.
One relation keeps the splits apart: two definitions are *near-twins* if their sets of words have a Jaccard index of at
least 0.7, or if one occurs inside the other. No row of `train` has a near-twin in `valid` or `test`, and no row of
`valid` has one in `test`.

General text, to see what an adapter costs a model on what it was not made for, is example sentences.
"""

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

DATA = Path(__file__).resolve().parent.parent / "minilora" / "assets" / "data"
CATEGORIES = {  # lexicographer file number -> the word we answer with, one token in every tokenizer used here
    "04": "act",
    "05": "animal",
    "08": "body",
    "13": "food",
    "15": "place",
    "18": "person",
    "20": "plant",
    "27": "substance",
}
SIZES = {"test": 800, "valid": 400, "train": 1600}  # drawn in this order: a later split avoids the earlier ones
TWIN_JACCARD = 0.7
SENTENCES = 256
UNPLEASANT = (  # words that begin so
    r"(?i)\b(kill|murder|rape|sex|slave|negro|whore|drunk|drug|suicid|nazi|bomb|war\b|death|dead|blood|hate|victim|heroin|"
    r"mdma|hashish|sperm|semen|massacre|execut|assassin|abus|terror|weapon|attack|plague|atrocit|lover|drawn and)"
)
NOTICE = """\
The definitions in train.jsonl, valid.jsonl and test.jsonl are glosses of WordNet 3.0, cut before their first example;
the sentences in general.jsonl are examples of their use.
The model and the tokenizer in ../model were trained on WordNet 3.0 text. The licence of WordNet 3.0 follows.

"""


class Synset(NamedTuple):
    """One line of a WordNet data file: the lexicographer file it came from, its words, its gloss with the examples."""

    file: str
    lemmas: tuple[str, ...]
    gloss: str


def read_synsets(wordnet: Path, part_of_speech: str) -> list[Synset]:
    """The synsets of one part of speech, in the file's order. Format: wndb(5WN)."""
    synsets = []
    for line in (wordnet / f"data.{part_of_speech}").read_text("ascii").splitlines():
        if line.startswith("  "):  # the licence
            continue
        fields, gloss = line.split(" | ", 1)
        _offset, file, _type, count, *words = fields.split(" ")
        lemmas = words[: 2 * int(count, 16) : 2]  # each word is followed by its sense number
        plain = (re.sub(r"\((a|p|ip)\)$", "", lemma).replace("_", " ") for lemma in lemmas)  # (a): attributive, ...
        synsets.append(Synset(file, tuple(plain), gloss.strip()))
    return synsets


def definition(gloss: str) -> str:
    """The gloss before its first example. Examples are the parts in quotes after a semicolon."""
    return re.split(r'\s*[;:,]\s*"|^"', gloss, maxsplit=1)[0].strip(" ;")


def normalise(text: str) -> str:
    """Lower-case words between single spaces, one at each end too, so that `in` finds whole words only."""
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "


def is_near_twin(a: str, b: str) -> bool:
    """Jaccard index of the sets of words at least 0.7, or one text within the other; both texts normalised."""
    first, second = set(a.split()), set(b.split())
    return len(first & second) >= TWIN_JACCARD * len(first | second) or a in b or b in a


def candidates(nouns: Iterable[Synset]) -> dict[str, list[str]]:
    """Category -> its definitions, each once and only if it is a definition in no other lexicographer file."""
    files = defaultdict(set)
    first = {}
    for synset in nouns:
        text = definition(synset.gloss)
        files[normalise(text)].add(synset.file)
        first.setdefault(normalise(text), text)
    found: dict[str, list[str]] = {category: [] for category in CATEGORIES.values()}
    for key, text in first.items():
        category = CATEGORIES.get(min(files[key]))
        if category and len(files[key]) == 1 and 20 <= len(text) <= 160 and '"' not in text:
            found[category].append(text)
    return found


def draw_splits(pool: dict[str, list[str]], sizes: dict[str, int], seed: int) -> dict[str, list[dict[str, str]]]:
    """Balanced splits: what earlier ones left of the shuffled categories, without the near-twins of their rows."""
    order = random.Random(seed)
    queues = {category: iter(order.sample(texts, len(texts))) for category, texts in pool.items()}
    splits: dict[str, list[dict[str, str]]] = {}
    earlier: list[str] = []
    for split, size in sizes.items():
        rows = []
        for category, queue in queues.items():
            apart = (text for text in queue if not any(is_near_twin(normalise(text), other) for other in earlier))
            chosen = [next(apart) for _ in range(size // len(pool))]
            rows += [{"prompt": f"Definition: {text}\nCategory:", "completion": f" {category}"} for text in chosen]
        order.shuffle(rows)
        splits[split] = rows
        earlier += [normalise(row_definition(row)) for row in rows]
    return splits


def row_definition(row: dict[str, str]) -> str:
    """The definition that a row asks about."""
    return row["prompt"].removeprefix("Definition: ").removesuffix("\nCategory:")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def general_sentences(synsets: Iterable[Synset], count: int, seed: int) -> list[str]:
    """Example sentences of a sentence's length, and of a kind to be looked at with pleasure."""
    found = {text for synset in synsets for text in re.findall(r'"([^"]+)"', synset.gloss)}
    fit = sorted(
        t for t in found if 60 <= len(t) <= 160 and not re.search(UNPLEASANT, t) and not re.search("[`_]|--", t)
    )
    return random.Random(seed).sample(fit, count)


def pretraining_texts(synsets: Iterable[Synset], held_out: Sequence[str]) -> Iterator[str]:
    """Each synset as a dictionary entry and as a definition to name: what the model is pretrained on.

    A synset is left out if its gloss contains a held-out definition or its definition is contained in one. The
    lexicographer file, which is the answer of the instruction set, is never written.
    """
    held = [normalise(text) for text in held_out]
    joined = "\n".join(held)
    for _file, lemmas, gloss in synsets:
        whole, short = normalise(gloss), normalise(definition(gloss))
        if short in joined or any(text in whole for text in held):
            continue
        words = ", ".join(lemmas)
        yield f"{words}: {gloss}"
        yield f"Definition: {definition(gloss)}\nWord: {words}"


def read_licence(wordnet: Path) -> str:
    """The licence as it stands, with line numbers, at the head of each WordNet data file."""
    lines = (wordnet / "data.noun").read_text("ascii").splitlines()
    return "\n".join(line[4:].rstrip() for line in lines if line.startswith("  ")) + "\n"


def main() -> None:
    """Write the three splits and the licence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, required=True, metavar="DIR", help="the folder with data.noun")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    DATA.mkdir(parents=True, exist_ok=True)
    pool = candidates(read_synsets(arguments.wordnet, "noun"))
    for split, rows in draw_splits(pool, SIZES, arguments.seed).items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (DATA / f"{split}.jsonl").write_text(text, "utf-8", newline="\n")
        print(f"{split}: {len(rows)} rows, {len(text):,} bytes")
    synsets = (synset for kind in ("noun", "verb", "adj", "adv") for synset in read_synsets(arguments.wordnet, kind))
    sentences = general_sentences(synsets, SENTENCES, arguments.seed)
    text = "".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences)
    (DATA / "general.jsonl").write_text(text, "utf-8", newline="\n")
    (DATA / "LICENSE-WordNet.txt").write_text(NOTICE + read_licence(arguments.wordnet), "utf-8", newline="\n")


if __name__ == "__main__":
    main()
