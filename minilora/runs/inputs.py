"""The data of a run: files are found, encoded and split; general text is read."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from minilora.adapters.layout import tokenizer_of
from minilora.errors import DataError, FormatError
from minilora.files import ASSETS, BUILTIN, check_link, sha256_of
from minilora.models.tokenizer import Tokenizer, load_tokenizer
from minilora.runs.encoders import Dataset, encode_prompt, encode_rows, with_prompt_style
from minilora.runs.evaluate import Choices, Question, find_choices
from minilora.runs.formats import Conversation, PromptCompletion, Row, parse_row
from minilora.runs.rows import stream_rows
from minilora.runs.settings import DataConfig, Settings, TrainConfig, TrainOn

Names = str | Path | Sequence[str | Path]  # of files and directories
DATA_ENDINGS = (".jsonl", ".json", ".csv", ".tsv")
SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val"), "test": ("test",)}  # names of their files
MARGIN = 16  # tokens of an answer beyond twice those of the wanted one


def load_dataset(path: Names, tokenizer: Tokenizer, config: DataConfig | None = None) -> Dataset:
    """Read and tokenize the rows of files, and the training rows of directories and of "minilora/builtin".

    Raises:
        DataError: a row cannot be used (with file and line); a file without rows.
    """
    config, paths = config or DataConfig(), find_files(path)["train"]
    read = partial(stream_rows, *paths, columns=config.columns)
    return encode_rows(read(), with_prompt_style(tokenizer, config.prompt_style, read()), config)


@dataclass(frozen=True)
class Data:
    """A run's tokenized rows: to train on, to evaluate during it (valid) and after it (test), and general text."""

    tokenizer: Tokenizer
    train: Dataset
    valid: Dataset  # evaluated during training: `held_out` of `train`
    test: Dataset  # measured before and after
    choices: Choices | None
    files: dict[str, str]  # name, or path where names repeat -> SHA-256
    general: Dataset
    questions: Sequence[Question]  # of `test`

    @property
    def splits(self) -> dict[str, Dataset]:
        """Return the splits that have rows, by name, without the validation split where it is the test split."""
        valid = Dataset(()) if self.valid is self.test else self.valid
        splits = {"training": self.train, "validation": valid, "held-out": self.test, "general": self.general}
        return {name: rows for name, rows in splits.items() if rows}


def read_data(
    settings: Settings, adapters: Sequence[Path], began: datetime, show: Callable[[str], None] | None = None
) -> Data:
    """Find the files of all splits, encode their rows as the model's tokenizer and the settings say, and split them.

    The tokenizer of the adapter to start from comes first. Templates that write the date take that of the first start.
    """
    run, config = settings.run, settings.data
    files = find_files(run.data, run.eval_data)
    tokenizer = (tokenizer_of(run.model, adapters) if adapters else None) or load_tokenizer(run.model)
    tokenizer = tokenizer.with_files({}, began.astimezone())
    rows = {split: partial(stream_rows, *paths, columns=config.columns) for split, paths in files.items()}
    tokenizer = with_prompt_style(tokenizer, config.prompt_style, rows["train"]())
    encoded = {split: encode_rows(read(), tokenizer, config, show) for split, read in rows.items()}
    splits = hold_out(encoded, run.eval_split, settings.training)
    general = load_general(run.general_data, tokenizer, config)
    questions: list[Question] = []
    if splits["test"]:
        split = next(split for split in files if splits["test"][0] in encoded[split])  # that they are from
        questions = find_questions(rows[split](), splits["test"], tokenizer, config)
    paths = list(chain(*files.values()))
    is_distinct = len({path.name for path in paths}) == len(paths)
    return Data(
        tokenizer,
        **splits,
        choices=find_choices(splits["test"]),
        files={(path.name if is_distinct else str(path)): sha256_of(path) for path in paths},
        general=general,
        questions=questions,
    )


def find_questions(rows: Iterable[Row], test: Dataset, tokenizer: Tokenizer, config: DataConfig) -> list[Question]:
    """Return the rows of a data set that ask for an answer, from the rows that it was encoded from."""
    used = {example.source for example in test}
    read = {row.source: row for row in rows if row.source in used}
    questions = []
    for example in test:
        row = read[example.source]
        parsed = parse_row(row.fields, config.system)
        if (wanted := _wanted_answer(parsed, config.train_on)) is not None:
            thinking = parsed.thinking if isinstance(parsed, Conversation) else None
            tokens = encode_prompt(row, tokenizer, config.system, "plain", thinking)
            fields = {"prompt": tokenizer.decode(tokens), **row.fields, "wanted": wanted}
            questions.append(Question(fields, tokens, 2 * example.labelled + MARGIN))
    return questions


def _wanted_answer(parsed: PromptCompletion | Conversation, train_on: TrainOn) -> Any:
    """Return what a row wants as the answer to its prompt: text, or a message; None if nothing is asked in it."""
    if train_on == "all":
        return None
    if isinstance(parsed, PromptCompletion):
        return parsed.completion if parsed.prompt else None
    last = parsed.messages[-1]
    return (last.get("content") or last) if last["role"] == "assistant" else None


def find_files(names: Names, eval_data: str | None = None) -> dict[str, list[Path]]:
    """Return the files of a data set by split; those of `eval_data` are the test split."""
    files = find_splits(names)
    if "train" not in files:
        shown = names if isinstance(names, str | Path) else ", ".join(map(str, names))
        raise DataError(f"{shown}: there are no training rows; found {sorted(files)}")
    if eval_data is not None:
        if "test" in files:
            raise DataError(f"{eval_data}: the data has a test split already, {files['test'][0]}; leave eval_data out")
        files["test"] = files_to_evaluate(eval_data)
        if both := {path.resolve() for path in files["test"]} & {path.resolve() for path in files["train"]}:
            raise DataError(f"{both.pop()}: is in data and in eval_data; rows that are trained on are not held out")
    return files


def find_splits(names: Names) -> dict[str, list[Path]]:
    """Return the files of a data set by split.

    The splits of a directory are its files `train`, `valid` (or `validation`, `val`) and `test`. A file by itself, the
    only one of a directory, or all its documents are "train". Several names are joined.
    """
    files: dict[str, list[Path]] = {}
    for name in [names] if isinstance(names, str | Path) else names:
        for split, paths in _splits_of(name).items():
            files.setdefault(split, []).extend(paths)
    return files


def _splits_of(name: str | Path) -> dict[str, list[Path]]:
    path, splits = ASSETS / "data" if name == BUILTIN else Path(name), dict[str, list[Path]]()
    if not name or not path.exists():
        convert = 'datasets.load_dataset(NAME, split="train").to_json("rows.jsonl")'
        advice = "" if path.suffix else f"; in Python, {convert} writes a data set of the Hub"
        raise FormatError(f"{path}: no such file or directory{advice}")
    if not path.is_dir():
        return {"train": [path]}
    named = [file for file in sorted(path.iterdir()) if file.name[0] != "." and file.is_file()]
    files = [file for file in named if file.name.endswith(DATA_ENDINGS)]
    documents = [file for file in named if file.suffix in (".txt", ".parquet") and not files]
    for file in (*files, *documents):
        check_link(file)
        stem = file.name.partition(".")[0]
        for split in (split for split, names in SPLITS.items() if stem in names):
            if split in splits:
                both = f"{splits[split][0].name} and {file.name}"
                raise DataError(f"{path}: {both} are both the {split} split; remove one")
            splits[split] = [file]
    if not splits and (documents or len(files) == 1):
        return {"train": documents or files}
    if not splits:
        need = f"one data file (*{', *'.join(DATA_ENDINGS)}), documents (*.txt), or train.jsonl"
        need += ", with valid.jsonl and test.jsonl if you have them"
        raise DataError(f"{path}: need {need}; found {[file.name for file in named[:9]]}")
    return splits


def files_to_evaluate(names: Names) -> list[Path]:
    """Return the files of the test split, else of the validation split, else of the training split."""
    files = find_splits(names)
    return next(files[split] for split in ("test", "valid", "train") if split in files)


def hold_out(splits: Mapping[str, Dataset], share: float, training: TrainConfig) -> dict[str, Dataset]:
    """Return the splits "train", "valid" and "test", for which a `share` of the training rows is held out if needed.

    Without test rows, rows are held out to measure the result; if the run selects the best adapter, others are to
    select it. Splits that the run does not tell apart are the same object.
    """
    splits = dict(splits)
    needed = ["test"] if "valid" not in splits else []
    if training.keep == "best":  # rows that select the adapter cannot also measure it
        needed = ["test", "valid"]
    missing = [split for split in needed if split not in splits]
    for i, split in enumerate(missing):
        whole = splits["train"]
        room = len(whole) - len(missing) + i  # a row stays to train on, and one for each split that follows
        if share and room > 0:
            shuffled = random.Random(training.seed).sample(whole, len(whole))
            held = min(max(1, int(share * len(shuffled))), room)
            splits["train"] = replace(whole, examples=shuffled[held:])
            splits[split] = Dataset(shuffled[:held], whole.cut)
    test = splits.get("test") or splits.get("valid") or Dataset(())
    valid = splits.get("valid") or test
    if training.keep == "best" and not valid:
        raise DataError("there are no held-out rows to choose the best weights by; raise eval_split, or give eval_data")
    return {"train": splits["train"], "valid": valid, "test": test}


def load_general(name: str, tokenizer: Tokenizer, config: DataConfig) -> Dataset:
    """Read and tokenize general text, with a label on every token; "none" is an empty data set."""
    if name == "none":
        return Dataset(())
    files = files_to_evaluate(ASSETS / "data" / "general.jsonl" if name == BUILTIN else name)
    config = replace(config, train_on="all", system=None)
    return encode_rows(stream_rows(*files, columns={"text": "text"}), tokenizer, config)
