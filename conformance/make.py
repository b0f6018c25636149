"""Make the files of the kit: the same bytes each time.

    python -m conformance.make [DIRECTORY]

All numbers are whole numbers of eight bits times a power of two, drawn by SHAKE-256 from their names. The expected
logits are those of `readers/numpy_reader.py`, rounded to multiples of 2⁻³⁰, so that the last bits of another
processor's `exp` do not show. Needs only numpy.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from conformance.readers import numpy_reader as reader
from conformance.readers.numpy_reader import EMBEDDING, HEAD, PREFIX, ROWS, STATE, Array, Case, Tensors
from conformance.run import distance

HERE = Path(__file__).parent
TOKENS = [3, 17, 5, 17, 29, 11, 5, 2, 23, 9]
UNITS = {"float32": 2.0**-24, "bfloat16": 2.0**-8}  # the largest relative error of a rounding
LEVELS = (  # of NF4
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

# --- bases ---

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
SIZES |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
LLAMA = {**SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
LLAMA |= {"rope_theta": 10000.0, "tie_word_embeddings": False, "dtype": "float32"}
TIED = {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "dtype": "bfloat16"}
WIDE = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}
QWEN3 = {**LLAMA, **WIDE, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "rope_theta": 1000000.0}
QWEN3 |= {"tie_word_embeddings": True, "dtype": "bfloat16"}
GEMMA3 = {**SIZES, **WIDE, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
GEMMA3 |= {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 16, "sliding_window": 4}
GEMMA3 |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window_pattern": 2}
GEMMA3 |= {"rope_local_base_freq": 100.0, "rope_theta": 10000.0, "tie_word_embeddings": True, "dtype": "bfloat16"}
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
BITSANDBYTES |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8"}
BITSANDBYTES |= {"bnb_4bit_compute_dtype": "float32", "llm_int8_skip_modules": None}
FOUR_BIT = {**LLAMA, "hidden_size": 64, "intermediate_size": 320, "num_hidden_layers": 1, "head_dim": 16}
FOUR_BIT["quantization_config"] = BITSANDBYTES
BASES = {"llama": LLAMA, "llama-tied": TIED, "qwen3": QWEN3, "gemma3": GEMMA3, "llama-4bit": FOUR_BIT}


def base_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the names of the tensors of a base, and their shapes."""
    V, D, F, E = (config[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "head_dim"))
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    linears = {"self_attn.q_proj": (H * E, D), "self_attn.k_proj": (K * E, D), "self_attn.v_proj": (K * E, D)}
    linears |= {"self_attn.o_proj": (D, H * E)}
    linears |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    block: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linears.items()}
    if config.get("attention_bias"):
        block |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    block |= {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
    if config["model_type"] != "llama":
        block |= {"self_attn.q_norm.weight": (E,), "self_attn.k_norm.weight": (E,)}
    if config["model_type"] == "gemma3_text":
        block |= {"pre_feedforward_layernorm.weight": (D,), "post_feedforward_layernorm.weight": (D,)}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (V, D), "model.norm.weight": (D,)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes if config["tie_word_embeddings"] else shapes | {HEAD: (V, D)}


def base_tensors(config: Mapping[str, Any]) -> dict[str, tuple[str, Array]]:
    """Return the tensors of a base with their dtypes in the file."""
    dtype, tensors = {"float32": "F32", "bfloat16": "BF16"}[config["dtype"]], {}
    for name, shape in base_shapes(config).items():
        if "quantization_config" in config and "_proj" in name:
            tensors |= packed(name, shape)
        elif "norm" in name:
            tensors[name] = dtype, around_one(name, *shape) - (config["model_type"] == "gemma3_text")
        elif name == EMBEDDING or name.endswith("bias"):
            tensors[name] = dtype, drawn(name, *shape) / 128
        else:
            tensors[name] = dtype, matrix(name, *shape)
    return tensors


def packed(name: str, shape: tuple[int, ...]) -> dict[str, tuple[str, Array]]:
    """Return the tensors of a 4-bit weight as bitsandbytes stores them, with random codes."""
    blocks, offset = math.prod(shape) // 64, 2.0 ** (1 - round(math.log2(shape[1]) / 2))
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": shape}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    middles = [(0.1 + 0.9 * (k + 0.5) / 2**i) * 10.0 ** (i - 6) for i in range(7) for k in range(2**i)]
    scales = offset / 2 * around_one(f"{name}.nested_absmax", -(-blocks // 256))
    return {
        name: ("U8", (drawn(name, 32 * blocks, 1) + 255) / 2),
        f"{name}.absmax": ("U8", (drawn(f"{name}.absmax", blocks) + 255) / 2),
        f"{name}.quant_map": ("F32", np.array(LEVELS)),
        f"{name}.nested_absmax": ("F32", scales),
        f"{name}.nested_quant_map": ("F32", np.array(sorted([0.0, 1.0, *middles, *(-middle for middle in middles)]))),
        name + STATE: ("U8", np.frombuffer(json.dumps(state).encode(), "u1")),
    }


def drawn(name: str, *shape: int) -> Array:
    """Return odd numbers from -255 to 255."""
    numbers = hashlib.shake_256(name.encode()).digest(math.prod(shape))
    return 2.0 * np.frombuffer(numbers, "u1").reshape(shape) - 255


def matrix(name: str, out: int, inner: int, gain: float = 1.0) -> Array:
    """Return W (out, in) such that the numbers of W x are about `gain` times as large as those of x."""
    return drawn(name, out, inner) * 2.0 ** -round(math.log2(147 * math.sqrt(inner) / gain))


def around_one(name: str, size: int) -> Array:
    """Return numbers from 0.5 to 1.5."""
    return 1 + np.floor(drawn(name, size) / 4) / 128


# --- adapters ---

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DEEP, SQUARE = ["v_proj", "o_proj", "down_proj"], ["q_proj", "o_proj"]
GAIN = {False: 0.8, True: 1.2}  # of s·B A in LoRA and in DoRA
RSLORA = {"r": 6, "lora_alpha": 9, "use_rslora": True}
RANKS = {"v_proj": 2, "^model.layers.1.mlp.down_proj": 1}
ALPHAS = {"^model.layers.1.self_attn.o_proj": 2, "v_proj": 3, "self_attn.v_proj": 10, "proj": 7}
ALPHAS |= {"^model.layers.0.mlp.up": 150, "o_proj": 20, "down_proj": 4}
WRAPPED = {"^model.language_model.layers.1.self_attn.o_proj": 2}
REGEX = {r"layers\.\d+\.mlp\.(up|down)_proj": 40, "o_proj": 1}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> base, fields other than DEFAULTS
    "plain": ("llama", {}),
    "rslora": ("llama", RSLORA),
    "square": ("llama", {"r": 16, "lora_alpha": 24, "target_modules": SQUARE}),
    "layers": ("llama", {"lora_alpha": 8, "target_modules": DEEP, "layers_to_transform": [1]}),
    "patterns": ("qwen3", {"rank_pattern": RANKS, "alpha_pattern": ALPHAS}),
    "regex": ("qwen3", {**RSLORA, "alpha_pattern": REGEX}),
    "half": ("gemma3", {}),
    "wrapper": ("gemma3", {"r": 8, "lora_alpha": 20, "alpha_pattern": WRAPPED}),
    "dora": ("llama", {"r": 3, "lora_alpha": 9, "use_dora": True, "target_modules": SQUARE}),
    "dora-rslora": ("llama-tied", {**RSLORA, "use_dora": True, "target_modules": DEEP}),
    "biases": ("llama-tied", {"bias": "all", "target_modules": ["q_proj", "down_proj"]}),
    "lora-bias": ("llama-tied", {"lora_bias": True, "bias": "lora_only", "target_modules": DEEP}),
    "embedding": ("llama-tied", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "full": ("llama", {"r": 8, "modules_to_save": ["embed_tokens", "lm_head"], "target_modules": DEEP[1:]}),
    "rows": ("llama-tied", {"trainable_token_indices": {"embed_tokens": [17, 5, 29]}, "target_modules": DEEP[1:]}),
    "4bit": ("llama-4bit", {}),
    "4bit-dora": ("llama-4bit", {"use_dora": True, "target_modules": DEEP}),
}
MISSING = {"layers": "lora_alpha", "full": "r"}  # fields that the file leaves out
DTYPES_OF = {"half": "F16", "dora-rslora": "BF16"}
DEFAULTS: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True}
DEFAULTS |= {"r": 5, "lora_alpha": 15, "lora_dropout": 0.0, "target_modules": LINEARS, "bias": "none"}
DEFAULTS |= dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"), False)
DEFAULTS |= dict.fromkeys(("layers_to_transform", "modules_to_save", "trainable_token_indices"))
DEFAULTS |= {"rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True}


def adapter_tensors(name: str, config: Mapping[str, Any], values: Mapping[str, Any]) -> Tensors:
    """Return the tensors of an adapter by their names in the file."""
    shapes = base_shapes(config)
    shapes.setdefault(HEAD, shapes[EMBEDDING])  # which can be adapted if it is tied, too
    tensors = {}
    for weight, shape in shapes.items():
        path, _, kind = weight.rpartition(".")
        module = path.rpartition(".")[2]
        if module in (values["modules_to_save"] or ()):
            tensors[weight] = drawn(f"{name} {weight}", *shape) / 128
        elif is_adapted(path, values) and kind == "weight":
            tensors |= {f"{path}.{key}": part for key, part in low_rank(name, path, shape, values).items()}
        trained = {"none": False, "all": True, "lora_only": is_adapted(path, values)}[values["bias"]]
        if kind == "bias" and trained:
            key = f"{path}.base_layer.bias" if is_adapted(path, values) else weight
            tensors[key] = drawn(f"{name} {weight}", *shape) / 128
        if weight == EMBEDDING and is_adapted(path, values):  # as PEFT saves it, and the head's as well
            copy = base_tensors(config)[EMBEDDING][1]
            tensors |= {f"{path}.base_layer.weight": copy, "lm_head.base_layer.weight": copy}
    for tokens in (values["trainable_token_indices"] or {}).values():
        tensors[f"model.embed_tokens{ROWS}"] = drawn(f"{name} rows", len(tokens), config["hidden_size"]) / 64
    return {PREFIX + in_file(name, key): tensor for key, tensor in tensors.items()}


def in_file(name: str, path: str) -> str:
    return path.replace("model.", "model.language_model.", 1) if name == "wrapper" else path


def is_adapted(path: str, values: Mapping[str, Any]) -> bool:
    layers = values["layers_to_transform"]
    in_layer = layers is None or path.startswith(tuple(f"model.layers.{layer}." for layer in layers))
    return in_layer and path.rpartition(".")[2] in values["target_modules"]


def low_rank(name: str, path: str, shape: tuple[int, ...], values: Mapping[str, Any]) -> Tensors:
    """Return A and B of a module, and what else there is of it."""
    r = reader.matched(values["rank_pattern"], path, values["r"])
    s, draw = reader.scale(values, in_file(name, path), r), f"{name} {path}"
    if path == EMBEDDING.removesuffix(".weight"):
        tokens, width = shape
        parts = {"lora_embedding_A": drawn(draw + "A", r, tokens) / 128}
        return parts | {"lora_embedding_B": matrix(draw + "B", width, r, GAIN[False] / s)}
    out, inner = shape
    gain = GAIN[values["use_dora"]] / s
    if path == "lm_head":
        gain *= math.sqrt(inner)  # tied to the embedding, whose numbers are larger than those of other matrices
    parts = {"lora_A.weight": matrix(draw + "A", r, inner), "lora_B.weight": matrix(draw + "B", out, r, gain)}
    if name == "half":  # half of A's numbers are subnormal in float16
        parts = {"lora_A.weight": parts["lora_A.weight"] / 2**12, "lora_B.weight": parts["lora_B.weight"] * 2**12}
    if values["use_dora"]:
        parts["lora_magnitude_vector"] = 4 * around_one(draw + "m", out)
    if values["lora_bias"]:
        parts["lora_B.bias"] = drawn(draw + "b", out) * 2.0 ** -round(math.log2(128 * s))
    return parts


# --- cases, and what wrong readers make of them ---

CASES: dict[str, tuple[str, list[str]]] = {  # name -> base, adapters
    **{f"base-{name}": (name, []) for name in BASES},
    **{name: (base, [name]) for name, (base, _) in ADAPTERS.items()},
    "sum": ("llama", ["plain", "rslora"]),
    "merged": ("llama-merged", []),
}

Change = Callable[[Mapping[str, Any], Tensors], Mapping[str, Array | None]]  # JSON, tensors -> other tensors, or none

SCALES: dict[str, Callable[[Mapping[str, Any], float, int], float]] = {  # of the JSON, α and r of the module
    "1": lambda values, alpha, r: 1,
    "α": lambda values, alpha, r: alpha,
    "α/r": lambda values, alpha, r: alpha / r,
    "α/√r": lambda values, alpha, r: alpha / math.sqrt(r),
    "(α/r)²": lambda values, alpha, r: (alpha / r) ** 2,
    "(α/√r)²": lambda values, alpha, r: alpha**2 / r,
    "α/r, r without its pattern": lambda values, alpha, r: alpha / values["r"],
    "α/r, both without patterns": lambda values, alpha, r: values["lora_alpha"] / values["r"],
}
PATTERNS: dict[str, Callable[[Mapping[str, Any]], Iterable[tuple[str, Any]]]] = {  # of alpha_pattern, other items
    "without alpha_pattern": lambda keys: (),
    "of the last key that matches": lambda keys: reversed(keys.items()),
    "of the longest key that matches": lambda keys: sorted(keys.items(), key=lambda item: -len(item[0])),
    "no key with ^ matches": lambda keys: ((key, alpha) for key, alpha in keys.items() if key[0] != "^"),
    "keys match within a name": lambda keys: ((f".*{key}", alpha) for key, alpha in keys.items()),
    "keys match beginnings": lambda keys: ((f"{key}.*", alpha) for key, alpha in keys.items()),
    "keys are names": lambda keys: ((re.escape(key).replace("\\^", "^"), alpha) for key, alpha in keys.items()),
}
TURNS: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {
    "A and B exchanged": lambda A, B: (B, A),
    "B A transposed": lambda A, B: (B.T, A.T),
    "A transposed": lambda A, B: (A.T, B),
    "B transposed": lambda A, B: (A, B.T),
    "A read by columns": lambda A, B: (A.reshape(A.shape[::-1]).T, B),
    "B read by columns": lambda A, B: (A, B.reshape(B.shape[::-1]).T),
    "A and B read by columns": lambda A, B: (A.reshape(A.shape[::-1]).T, B.reshape(B.shape[::-1]).T),
}
PARTS = {  # what a reader may leave out -> a part of its tensors' names
    "the magnitude": "lora_magnitude",
    "trained biases": r"(_proj|base_layer)\.bias",
    "the bias of B": r"lora_B\.bias",
    "modules in full": r"(embed_tokens|lm_head)\.weight",
    "the embedding in full": r"embed_tokens\.weight",
    "the head in full": r"lm_head\.weight",
    "A and B of the embedding": "lora_embedding",
    "A and B of the head": r"lm_head\.lora",
    "token rows": "token_adapter",
}


def wrong_readings(case: Case) -> Iterator[tuple[str, Case]]:
    """Name mistakes, each with files of which a right reader makes what the mistaken one makes of these."""
    yield from wrong_codes(case)
    case = case._replace(tensors=reader.dense(case.tensors))
    if case.adapters:
        yield "does nothing", case._replace(adapters=[])
    defaults = [({"lora_alpha": 16, **values}, tensors) for values, tensors in case.adapters]
    yield "wrong α: 16 if missing", case._replace(adapters=defaults)
    for label, items in PATTERNS.items():
        others = [({**v, "alpha_pattern": dict(items(v["alpha_pattern"]))}, tensors) for v, tensors in case.adapters]
        yield f"wrong α: {label}", case._replace(adapters=others)
    for label, formula in SCALES.items():
        yield f"wrong scale: {label}", edited(case, partial(rescaled, formula))
    for label, turn in TURNS.items():
        other = edited(case, partial(turned, turn))
        if shapes_of(other) == shapes_of(case):
            yield f"wrong orientation: {label}", other
    for label, pattern in PARTS.items():
        yield f"part ignored: {label}", edited(case, partial(without, pattern))
    normal = edited(case, lambda _, tensors: {name: t * (abs(t) >= 2.0**-14) for name, t in tensors.items()})
    yield "part ignored: subnormal numbers of float16", normal
    yield "part ignored: A and B", edited(case, partial(rescaled, lambda *_: 0.0))
    if len(case.adapters) == 2:
        yield "part ignored: the second adapter", case._replace(adapters=case.adapters[:1])
        yield "part ignored: the first adapter", case._replace(adapters=case.adapters[1:])
    yield from wrong_biases(case)
    yield from wrong_norms(case)
    yield from wrong_rows(case)
    yield from wrong_ties(case)


def edited(case: Case, change: Change) -> Case:
    adapters = [(values, {**tensors, **change(values, tensors)}) for values, tensors in case.adapters]
    return case._replace(adapters=[(v, {k: t for k, t in each.items() if t is not None}) for v, each in adapters])


def shapes_of(case: Case) -> list[dict[str, tuple[int, ...]]]:
    return [{name: tensor.shape for name, tensor in tensors.items()} for _, tensors in case.adapters]


def rescaled(formula: Any, values: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Return what is multiplied by s, such that it is multiplied by another number."""
    changed = {}
    for name in (name for name in tensors if re.search(r"lora_(embedding_)?B", name)):
        where = reader.path_of(name)
        path, r = where.removeprefix(PREFIX), len(reader.factors(tensors, where)[1])
        full = {"r": 8, "lora_alpha": 8, **values}
        alpha = reader.matched(values["alpha_pattern"], path, full["lora_alpha"])
        changed[name] = tensors[name] * (formula(full, alpha, r) / reader.scale(values, path, r))
    return changed


def turned(turn: Any, values: Mapping[str, Any], tensors: Tensors) -> Tensors:
    changed = {}
    for name in (name for name in tensors if name.endswith("lora_A.weight")):
        pair = name, name.replace("lora_A", "lora_B")
        changed |= dict(zip(pair, turn(*(tensors[key] for key in pair)), strict=True))
    return changed


def without(pattern: str, values: Mapping[str, Any], tensors: Tensors) -> dict[str, None]:
    return dict.fromkeys(name for name in tensors if re.search(pattern, name))


def wrong_biases(case: Case) -> Iterator[tuple[str, Case]]:
    """Trained biases that are added, biases of B that are not scaled, or replace others."""

    def added(values: Mapping[str, Any], tensors: Tensors) -> Tensors:
        trained = {name: tensor for name, tensor in tensors.items() if re.search(PARTS["trained biases"], name)}
        base = {name: case.tensors[name.removeprefix(PREFIX).replace(".base_layer", "")] for name in trained}
        return {name: tensor + base[name] for name, tensor in trained.items()}

    def unscaled(values: Mapping[str, Any], tensors: Tensors) -> Tensors:
        s = DEFAULTS["lora_alpha"] / DEFAULTS["r"]
        return {name: tensor / s for name, tensor in tensors.items() if name.endswith("lora_B.bias")}

    def replaced(values: Mapping[str, Any], tensors: Tensors) -> Tensors:
        names = [name for name in tensors if name.endswith("lora_B.bias")]
        return {name.replace("lora_B", "base_layer"): 0 * tensors[name] for name in names}

    yield "wrong biases: trained ones added to the base's", edited(case, added)
    yield "wrong biases: that of B without s", edited(case, unscaled)
    yield "wrong biases: that of B in place of another", edited(case, replaced)


def wrong_norms(case: Case) -> Iterator[tuple[str, Case]]:
    """V / ‖V‖ with another norm is the right one with another magnitude."""
    base = reader.adapted(case.tensors, [])
    sums = reader.adapted(case.tensors, edited(case, partial(without, "lora_magnitude")).adapters)
    names = {name: reader.path_of(reader.text_name(name)) for _, each in case.adapters for name in each}
    paths = {name: path for name, path in names.items() if "magnitude" in name}

    def change(norm: Callable[[Array, Array], Array], values: Mapping[str, Any], tensors: Tensors) -> Tensors:
        weights = {name: (sums[f"{path}.weight"], base[f"{path}.weight"]) for name, path in paths.items()}
        return {name: tensors[name] * np.linalg.norm(V, axis=1) / norm(V, W) for name, (V, W) in weights.items()}

    def inside(values: Mapping[str, Any], tensors: Tensors) -> Tensors:
        shares = {name: tensors[name] / np.linalg.norm(sums[f"{path}.weight"], axis=1) for name, path in paths.items()}
        biases = {name: base[f"{path}.bias"] for name, path in paths.items() if f"{path}.bias" in base}
        return {
            name.replace("lora_magnitude_vector", "base_layer.bias"): b * shares[name] for name, b in biases.items()
        }

    yield "wrong norm: of W, not of W + s·B A", edited(case, partial(change, lambda V, W: np.linalg.norm(W, axis=1)))
    yield "wrong norm: the bias divided by it", edited(case, inside)
    if all(np.equal(*base[f"{path}.weight"].shape) for path in paths.values()):
        yield "wrong norm: of columns", edited(case, partial(change, lambda V, W: np.linalg.norm(V, axis=0)))


def wrong_rows(case: Case) -> Iterator[tuple[str, Case]]:
    """Token rows that are added, in another order, or not in the tied head."""
    name, E = f"{PREFIX}model.embed_tokens{ROWS}", case.tensors[EMBEDDING]
    for values, tensors in case.adapters:
        if name in tensors:
            tokens, rows = values["trainable_token_indices"]["embed_tokens"], tensors[name]
            others = {"added, not replaced": E[tokens] + rows}
            others["in the order of the vocabulary"] = rows[np.argsort(np.argsort(tokens))]
            for label, other in others.items():
                yield f"wrong rows: {label}", case._replace(adapters=[(values, {**tensors, name: other})])
            yield "part ignored: token rows in the tied head", case._replace(tensors={**case.tensors, HEAD: E})


def wrong_ties(case: Case) -> Iterator[tuple[str, Case]]:
    """Updates of the embedding and of the head tied to it that act on both."""
    names = {"A": "lm_head.lora_A.weight", "B": "lm_head.lora_B.weight"}
    names |= {f"e{key}": f"model.embed_tokens.lora_embedding_{key}" for key in "AB"}
    names = {key: PREFIX + name for key, name in names.items()}
    for values, tensors in case.adapters:
        if names["eA"] in tensors:
            A, B, eA, eB = (tensors[names[key]] for key in ("A", "B", "eA", "eB"))
            of_embedding, of_head = {names["A"]: eB.T, names["B"]: eA.T}, {names["eA"]: B.T, names["eB"]: A.T}
            for label, more in (
                ("the embedding's update acts on the head as well", of_embedding),
                ("the head's update acts on the embedding as well", of_head),
                ("both updates act on both", of_embedding | of_head),
            ):
                yield f"wrong tie: {label}", case._replace(adapters=[*case.adapters, (values, more)])
            E, s = case.tensors[EMBEDDING], reader.scale(values, "model.embed_tokens", len(eA))
            full = {names["eA"]: None, names["eB"]: None, PREFIX + EMBEDDING: E + s * (eB @ eA).reshape(E.shape)}
            yield "wrong orientation: B A of the embedding not transposed", edited(case, lambda *_, full=full: full)


def wrong_codes(case: Case) -> Iterator[tuple[str, Case]]:
    """4-bit weights read in another way."""
    weights = [name.removesuffix(STATE) for name in case.tensors if name.endswith(STATE)]
    halves = {name: case.tensors[name] >> 4 | case.tensors[name] << 4 for name in weights}
    states = {name + STATE: json.loads(bytes(case.tensors[name + STATE])) for name in weights}
    plain = {name: json.dumps({**state, "nested_offset": 0.0}).encode() for name, state in states.items()}
    if weights:
        yield "wrong 4-bit weights: the halves of bytes exchanged", case._replace(tensors=case.tensors | halves)
        offsets = {name: np.frombuffer(text, "u1") for name, text in plain.items()}
        yield "wrong 4-bit weights: without the offset", case._replace(tensors=case.tensors | offsets)


# --- tolerances ---


def condition(name: str, case: Case, right: Array) -> float:
    """Return how far logits move, relative to a change of every number of the files by that share of it.

    The root of the mean square over four draws of signs, at a change so small that the effect is linear.
    """
    step, base, squares = 2.0**-20, reader.dense(case.tensors), []

    def moved(draw: str, tensors: Tensors) -> Tensors:
        return {key: t * (1 + step * np.sign(drawn(f"{draw} {key}", *t.shape))) for key, t in tensors.items()}

    for draw in range(4):
        label = f"{name} {draw}"
        adapters = [(values, moved(f"{label} {i}", tensors)) for i, (values, tensors) in enumerate(case.adapters)]
        found = reader.logits(Case(case.config, moved(label, base), adapters), TOKENS)
        squares.append(distance(found, right) ** 2)
    return math.sqrt(sum(squares) / len(squares)) / step


def tolerances(kappa: float, config: Mapping[str, Any]) -> dict[str, float]:
    """Return 2·κ·u, in float32 times √k for sums of k products, in two digits."""
    longest = math.sqrt(max(config["hidden_size"], config["intermediate_size"]))
    factors = {"float32": 2 * longest, "bfloat16": 2}
    return {name: float(f"{factor * kappa * UNITS[name]:.1e}") for name, factor in factors.items()}


# --- files ---


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def write_tensors(path: Path, tensors: Mapping[str, tuple[str, Array]]) -> None:
    """Write safetensors, the widest numbers first, so that all are aligned."""
    widths = {name: np.dtype(reader.DTYPES[dtype]).itemsize for name, (dtype, _) in tensors.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name in sorted(tensors, key=lambda name: (-widths[name], name)):
        dtype, array = tensors[name]
        wide = array.astype("<f4").view("<u4") >> 16 if dtype == "BF16" else array
        part = wide.astype(reader.DTYPES[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_model(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, tuple[str, Array]]) -> None:
    write_json(directory / "config.json", config)
    write_tensors(directory / "model.safetensors", tensors)


def main(directory: Path = HERE) -> None:
    bases, adapters = directory / "bases", directory / "adapters"
    for name, config in BASES.items():
        write_model(bases / name, config, base_tensors(config))
    for name, (base, changes) in ADAPTERS.items():
        values, dtype = {**DEFAULTS, **changes}, DTYPES_OF.get(name, "F32")
        tensors = adapter_tensors(name, BASES[base], values)
        fields = {key: value for key, value in values.items() if key != MISSING.get(name)}
        write_json(adapters / name / "adapter_config.json", fields)
        write_tensors(adapters / name / "adapter_model.safetensors", {key: (dtype, t) for key, t in tensors.items()})
    plain = reader.read_case(bases / "llama", [adapters / "plain"])
    merged = reader.adapted(plain.tensors, plain.adapters)  # which float32 represents
    write_model(bases / "llama-merged", plain.config, {name: ("F32", tensor) for name, tensor in merged.items()})
    manifest: dict[str, Any] = {"cases": {}, "files": {}}
    stored: dict[str, tuple[str, Array]] = {}
    for name, (base, names) in CASES.items():
        case = reader.read_case(bases / base, [adapters / each for each in names])
        right = reader.logits(case, TOKENS)
        wrong: dict[str, Array] = {}
        for label, other in wrong_readings(case):
            found = reader.logits(other, TOKENS)
            if all(distance(found, known) > 1e-9 for known in (right, *wrong.values())):
                wrong[label] = found
        kappa = condition(name, case, right)
        manifest["cases"][name] = {
            "base": f"bases/{base}",
            "adapters": [f"adapters/{each}" for each in names],
            "tokens": TOKENS,
            "tolerance": tolerances(kappa, case.config),
            "wrong": list(wrong),
        }
        stored[name] = "F64", np.round(right * 2.0**30) / 2.0**30
        stored |= {f"{name}: {label}": ("F32", found) for label, found in wrong.items()}
    write_tensors(directory / "logits.safetensors", stored)
    files = [*bases.rglob("*.*"), *adapters.rglob("*.*"), directory / "logits.safetensors"]
    for path in sorted(files):
        manifest["files"][path.relative_to(directory).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    write_json(directory / "manifest.json", manifest)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
