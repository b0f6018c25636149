"""What other programs make of an adapter in PEFT's layout: a table of their rules, and what follows for an adapter."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from minilora.adapter import PREFIX
from minilora.adapters import layout
from minilora.adapters.config import LoraConfig
from minilora.adapters.layout import CONFIG_FILE, WEIGHTS_FILE, parse_tensor_name
from minilora.errors import MiniloraError
from minilora.files import TensorFile, read_json, tensor_files
from minilora.lora import lora_scale
from minilora.models.bitsandbytes import weight_shapes
from minilora.models.config import is_wrapper, text_config, text_files, text_name, text_path

READS, IGNORES, REFUSES = RULINGS = "reads", "ignores", "refuses"  # ignores: loads the rest as if this were not there
R, S, X = RULINGS  # reads, skips, refuses: for the table below
RIGHT = "acts as trained"
COLUMNS = ("minilora", "PEFT", "vLLM", "mlx-lm", "llama.cpp")
LOW_RANK, MORE = "A and B, copies of the base's weight", "bias, lora_bias, modules_to_save, trainable_token_indices"
RULES = {  # tensors, settings and names -> what each program does; of mlx-lm, what its own layout can hold
    LOW_RANK: (R, R, R, R, R),
    "A and B of the embedding or the head, which are tied": (R, R, R, X, X),
    "A and B of stacked experts (target_parameters)": (X, R, R, X, X),
    "modules of a wrapper's other parts": (X, R, S, X, S),
    "use_rslora": (R, R, R, S, S),
    "rank_pattern": (R, R, S, S, R),
    "alpha_pattern": (R, R, S, S, S),
    "use_dora": (R, R, X, R, X),
    MORE: (R, R, X, X, X),
    "init_lora_weights that changes the base": (R, R, S, X, S),
    "a setting that minilora does not know": (X, R, S, X, S),
    "a module that the model does not have": (X, S, S, X, X),
    "a name without base_model.model.": (X, S, R, X, R),
    "a name with the adapter's in it, as .default.": (R, R, X, R, X),
}
SCALE_FIELDS = ("use_rslora", "rank_pattern", "alpha_pattern")
NAMED = re.compile(r"\.lora_(?:[AB]\.[^.]+\.\w+|embedding_[AB]\.[^.]+|magnitude_vector\.(?!weight$).+)$")
STACKED = re.compile(r"\.experts(?:\.base_layer)*$")  # all experts of a layer in one tensor
CAUSAL, VISION, OUTER = "model.", "model.language_model.", "language_model.model."  # in a name, before "layers.0"
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


class Reader(NamedTuple):
    column: str  # of `RULES`
    source: str  # where its rules were read
    is_tried: bool  # whether a test or a script runs it
    roots: tuple[str, ...]  # how names in a wrapper begin; `export` writes the first
    most: float = math.inf  # the largest rank
    reads_peft: bool = True  # or else the layout that `export` writes

    def ruling(self, row: str) -> str:
        """Return what it does with a row of `RULES`."""
        return RULES[row][COLUMNS.index(self.column)]


READERS = {
    "minilora": Reader("minilora", "minilora/adapters/layout.py", True, (CAUSAL, VISION, OUTER)),
    "peft": Reader("PEFT", "PEFT 0.21.2 on a causal model: utils/save_and_load.py", True, (CAUSAL,)),
    "peft-wrapper": Reader("PEFT", "PEFT 0.21.2 on a model with a vision wrapper", True, (VISION,)),
    "vllm": Reader("vLLM", "vLLM: peft_helper.py (0.30), lora_model.py, utils.py (2026)", False, (VISION, OUTER), 512),
    "mlx-lm": Reader("mlx-lm", "mlx-lm 0.32.2: tuner/utils.py, tuner/lora.py", True, (OUTER,), reads_peft=False),
    "llama.cpp": Reader("llama.cpp", "llama.cpp's convert_lora_to_gguf.py", True, (CAUSAL, VISION, OUTER)),
}


class Base(NamedTuple):
    """A model directory, by the headers of its files."""

    modules: Mapping[str, tuple[int, ...]]  # path in the text model -> shape of the weight
    others: frozenset[str]  # paths of a wrapper's other modules
    is_wrapper: bool
    is_tied: bool  # whether the head is the embedding
    config: Mapping[str, Any]  # of the text model

    @classmethod
    def read(cls, directory: Path) -> "Base":
        shapes = weight_shapes(text_files(directory))
        modules = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
        config, wrapped = text_config(read_json(directory / "config.json")), is_wrapper(directory)
        is_tied = HEAD not in modules or config.get("tie_word_embeddings") is True
        modules.setdefault(HEAD, modules.get(EMBEDDING, ()))
        others = [name for name in tensor_files(directory) if wrapped and not text_name(name)]
        paths = (f"model.{name.removeprefix('model.').removesuffix('.weight')}" for name in others)
        return cls(modules, frozenset(paths), wrapped, is_tied, config)

    def names(self, path: str, reader: Reader) -> list[str]:
        """Return the names that a reader has for a module."""
        if path in self.others:
            return [path]
        roots = reader.roots if self.is_wrapper or CAUSAL in reader.roots else (CAUSAL,)
        if path.startswith(CAUSAL):
            return [root + path.removeprefix(CAUSAL) for root in roots]
        return [f"language_model.{path}" if root == OUTER else path for root in roots]


def reader_facts(adapter: Path, base: Base, only: str | None = None) -> dict[str, dict[str, Any]]:
    """Describe what each reader, or `only` one, makes of an adapter on a base, without reading a weight of the base.

    "reads" lists the tensors that act. "ignores" and "refuses" have the other tensors and settings, with the reason; a
    reader that refuses one refuses the adapter. "scales" has the scales of the training and of the reader, by module.
    """
    shapes, values = TensorFile(adapter / WEIGHTS_FILE).shapes, read_json(adapter / CONFIG_FILE)
    low_rank = _read_low_rank(adapter)
    config = low_rank.config()
    pairs = {path: (held["lora_A"], held["lora_B"]) for path, held in low_rank.tensors.items() if len(held) == 2}
    idle = low_rank.tensors.keys() - {p for p, pair in pairs.items() if all(factor.float().any() for factor in pair)}
    misfits = dict.fromkeys((p for p, (A, B) in pairs.items() if len(A) != B.size(1)), "A and B are of two ranks")
    settings = dict.fromkeys(layout.unknown_settings(values), "a setting that minilora does not know")
    settings.pop("target_parameters", None)  # has tensors of its own
    if values.get("init_lora_weights") in layout.DETERMINISTIC_INITS:
        settings["init_lora_weights"] = "init_lora_weights that changes the base"
    facts = {}
    for title in [only] if only else [title for title in READERS if base.is_wrapper or title != "peft-wrapper"]:
        reader = READERS[title]
        found: dict[str, dict[str, str]] = {READS: {}, IGNORES: {}, REFUSES: {**misfits}}
        for name, shape in shapes.items():
            ruling, why = max(_rulings(name, shape, base, reader), key=lambda pair: RULINGS.index(pair[0]))
            found[ruling][name] = why
        for setting, row in settings.items():
            if (ruling := reader.ruling(row)) != READS:
                found[ruling][setting] = row
        if title == "minilora":
            try:
                layout.read_adapter(adapter, is_for_text=True).config()
            except MiniloraError as error:
                found[REFUSES][CONFIG_FILE] = str(error)
        scales = {path: (config.scale(path), _scale_of(path, config, reader)) for path in low_rank.tensors}
        is_zero = {parse_tensor_name(name)[0] for name in found[READS]} <= idle
        verdict = _verdict(found, is_zero, all(trained == taken for trained, taken in scales.values()))
        known = {"verdict": verdict, "source": reader.source, "tried": reader.is_tried, "scales": scales}
        facts[title] = {**known, **found, READS: list(found[READS])}
    return facts


def _read_low_rank(adapter: Path) -> layout.AdapterFile:
    """Read A and B of linears and embeddings, and the settings that their scale depends on, whatever else there is."""
    file, values = TensorFile(adapter / WEIGHTS_FILE), read_json(adapter / CONFIG_FILE)
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, shape in file.shapes.items():
        path, key = parse_tensor_name(name)
        if key in ("lora_A", "lora_B") and len(shape) == 2 and not STACKED.search(path):
            tensors.setdefault(path, {})[key] = file.read(name)
    known = {key: values[key] for key in ("r", "lora_alpha", *SCALE_FIELDS) if values.get(key)}
    layout.check_values(known, adapter / CONFIG_FILE)
    return layout.AdapterFile(adapter, known, tensors)


def _verdict(found: Mapping[str, Mapping[str, str]], is_zero: bool, is_scaled: bool) -> str:
    if found[REFUSES]:
        return "refuses it"
    if not found[READS]:
        return "nothing attaches"
    if is_zero:
        return "does nothing: B A is zero"
    if found[IGNORES]:
        return "loses a part"
    return RIGHT if is_scaled else "takes another scale"


def _rulings(name: str, shape: tuple[int, ...], base: Base, reader: Reader) -> Iterator[tuple[str, str]]:
    """Yield what a reader does with a tensor, and why, by each row of `RULES` that it is in."""
    path, key = parse_tensor_name(name)
    owner = path or key.rpartition(".")[0]
    text, is_embedding = text_path(owner), ".lora_embedding_" in name
    takes_any = reader.column == "minilora" or not reader.reads_peft  # in which case `export` gives them the names
    if not name.startswith(PREFIX):
        yield reader.ruling(row := "a name without base_model.model."), row
    if NAMED.search(name):
        yield reader.ruling(row := "a name with the adapter's in it, as .default."), row
    if STACKED.search(owner):
        row = "A and B of stacked experts (target_parameters)"
    elif owner in base.others and VISION in reader.roots:
        row = "modules of a wrapper's other parts"
    elif text not in base.modules or not (takes_any or owner in base.names(text, reader)):
        there = f", but {base.names(text, reader)[0]}" if text in base.modules else ""
        yield reader.ruling("a module that the model does not have"), f"the model has no such module{there}"
        return
    elif key in ("lora_A", "lora_B"):
        outer, weight = key == "lora_B", base.modules[text]
        if not len(shape) == len(weight) == 2 or shape[1 - outer] != weight[1 - (outer ^ is_embedding)]:
            yield REFUSES, f"{shape} does not fit the weight {weight}"
        elif shape[outer] > reader.most:
            yield REFUSES, f"the rank is {shape[outer]}, at most {reader.most} is accepted"
        is_tied = base.is_tied and (is_embedding or text == HEAD)
        row = "A and B of the embedding or the head, which are tied" if is_tied else LOW_RANK
    else:
        row = {"weight": LOW_RANK, "magnitude": "use_dora"}.get(key, MORE)
    yield reader.ruling(row), row


def _scale_of(path: str, config: LoraConfig, reader: Reader) -> float:
    """Return the scale that a reader takes for a module."""
    if not reader.reads_peft:  # `export` folds scales
        return config.scale(path)
    use_rslora, own_rank, own_alpha = (reader.ruling(row) == READS for row in SCALE_FIELDS)
    r = config.rank(path) if own_rank else config.r
    alpha = config.alpha(path) if own_alpha else config.lora_alpha
    return lora_scale(r, alpha, config.use_rslora and use_rslora)
