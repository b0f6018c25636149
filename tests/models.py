"""Tiny random decoders of every family, what the tests draw, and the memory that some work takes."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from minilora.adapter import adapter_layers, linear_layers
from minilora.kernels import llama as tiles
from minilora.kernels import nf4 as packed
from minilora.llama import Llama, LlamaConfig
from minilora.models.checkpoint import build_model
from minilora.models.config import parse_config
from minilora.nf4 import NF4Linear
from minilora.runs.sampler import adapters_with_dropout, seed_dropout

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
BIASES = {"attention_bias": True, "mlp_bias": True}
WINDOW = {"use_sliding_window": True, "sliding_window": 4}
QUERY = {"query_pre_attn_scalar": 3, "head_dim": 8}  # of Gemma 3, as are its rotations
BY_KIND = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 700.0},
    }
}
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4}
YARN |= {"beta_fast": 0.5, "beta_slow": 0.05}  # of three pairs one is kept, one is between, and one slows down
OLMO3 = {"sliding_attention": {"rope_theta": 50.0}, "full_attention": {**YARN, "rope_theta": 200.0}}
MINISTRAL3 = {**YARN, "rope_theta": 200.0, "mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.6}
DELTA = {  # of Qwen3.5: odd sizes, more value heads than key heads
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "linear_conv_kernel_dim": 3,
    "full_attention_interval": 2,
    "head_dim": 12,  # of which three rotate
    "rms_norm_eps": 0.02,  # without it the first outputs of a memory, which are small, would be all rounding
}
ONE_LAYER = {"num_hidden_layers": 1, "use_cache": False}  # transformers' cache needs a layer that attends
ODD = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 9, "attention_bias": True}
AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "mrope_section": [1, 1, 0]}}
EVERY_OTHER = ["sliding_attention", "full_attention"] * 2

# Every family, and every switch of each, as the keys of its config.json. Documents in tests are up to 30 tokens long.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-bias-tied-wide-heads": {"model_type": "llama", **BIASES, "head_dim": 10, "tie_word_embeddings": True},
    "llama-no-gqa": {"model_type": "llama", "num_key_value_heads": 4},
    "llama-3.1": {"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}},
    "llama-linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 700.0},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "mistral-no-window": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-window": {"model_type": "qwen2", **WINDOW, "max_window_layers": 2},
    "qwen3": {"model_type": "qwen3", "head_dim": 10},
    "qwen3.5": {"model_type": "qwen3_5_text", **DELTA},
    "qwen3.5-linear": {"model_type": "qwen3_5_text", **DELTA, **ONE_LAYER, "linear_num_key_heads": 1},
    "qwen3.5-full": {"model_type": "qwen3_5_text", "full_attention_interval": 1, **ODD, **AXES},
    "smollm3": {"model_type": "smollm3"},
    "smollm3-window": {"model_type": "smollm3", **WINDOW, "attention_bias": True, "no_rope_layers": [1, 0, 0, 1]},
    "smollm3-listed": {"model_type": "smollm3", "layer_types": EVERY_OTHER, "sliding_window": 4},
    "olmo2": {"model_type": "olmo2", "attention_bias": True},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 4, "layer_types": EVERY_OTHER, **QUERY, **BY_KIND},
    "olmo3": {"model_type": "olmo3", "sliding_window": 4, "rope_parameters": OLMO3},
    "olmo3-old": {"model_type": "olmo3", "rope_scaling": YARN, "layer_types": EVERY_OTHER, "attention_bias": True},
    "ministral3": {"model_type": "ministral3", "head_dim": 10, "rope_parameters": MINISTRAL3},
    "ministral3-window": {"model_type": "ministral3", "head_dim": 8, "rope_scaling": MINISTRAL3, "sliding_window": 5},
}


# What the fields of a `LoraConfig` can ask for, of a decoder with biases whose head is tied to the embedding.
WHOLE = "llama-bias-tied-wide-heads"
CONFIGS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3}},
    "DoRA": {"use_dora": True},
    "dropout": {"lora_dropout": 0.3},
    "a bias of B": {"lora_bias": True},
    "biases of adapted layers": {"bias": "lora_only", "target_modules": ("q_proj", "up_proj")},
    "all biases": {"bias": "all", "target_modules": ("q_proj",)},
    "all biases beside DoRA": {"bias": "all", "target_modules": ("q_proj",), "use_dora": True},
    "the head in full": {"modules_to_save": ("lm_head",)},
    "the embedding in full": {"modules_to_save": ("embed_tokens",)},
    "norms in full": {"modules_to_save": ("norm", "layers.1.mlp"), "bias": "all"},
    "only norms": {"target_modules": (), "modules_to_save": ("norm",)},
    "rows of tokens": {"trainable_token_indices": (7, 2, 40)},
    "rows of tokens by name": {"trainable_token_indices": {"embed_tokens": (3,)}, "target_modules": ("v_proj",)},
    "rows of a tied head": {"trainable_token_indices": {"embed_tokens": (3, 5), "lm_head": (3, 5)}},
    "other rows of a tied head": {"trainable_token_indices": {"embed_tokens": (3,), "lm_head": (7, 2)}},
    "only rows of tokens": {"target_modules": (), "trainable_token_indices": (7, 2)},
    "the embedding adapted": {"target_modules": ("embed_tokens", "q_proj")},
    "the embedding adapted by DoRA": {"target_modules": ("embed_tokens",), "use_dora": True},
    "the tied head adapted": {"target_modules": ("lm_head", "q_proj")},
    "gaussian": {"init_lora_weights": "gaussian"},
    "PiSSA": {"init_lora_weights": "pissa", "rank_pattern": {"o_proj": 2}},
    "PiSSA by DoRA": {"init_lora_weights": "pissa", "use_dora": True, "use_rslora": True},
}


# Beside each other these have every switch: biases, tied and wide heads, windows, scaled rotations, norms after both
# branches, queries that grow, convolutions and memories.
MOST_DIFFERENT = (
    "llama-bias-tied-wide-heads",
    "qwen3",
    "smollm3-window",
    "gemma3",
    "ministral3",
    "qwen3.5",
)


def by_family(*names: str) -> pytest.MarkDecorator:
    """Run a test for every family, by default for these."""
    marks = {name: () if name in names else pytest.mark.long for name in FAMILIES}
    return pytest.mark.parametrize("family", [pytest.param(name, marks=marks[name]) for name in FAMILIES])


KERNELS = ("kernels", "plain")
either = pytest.mark.parametrize("_kernels", KERNELS, indirect=True)  # a test with and without them
of_kernels = pytest.mark.skipif("config.getoption('--plain')", reason="only the kernels have this property")
families = by_family(*MOST_DIFFERENT)
layouts = by_family(WHOLE, "qwen3.5")  # where only names and shapes of tensors matter


def tiny_config(family: str = "llama", **changes: Any) -> LlamaConfig:
    return parse_config({**SIZES, **FAMILIES[family], **changes})


def tiny_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Llama:
    """A random model; norms and biases are drawn too, so that they matter."""
    model = build_model(tiny_config(family, **changes)).to(dtype).eval()
    model.tie_weights()
    fill_(model, seed)
    return model


def four_bit(model: torch.nn.Module, double_quant: bool = True, dense: str = "lm_head") -> torch.nn.Module:
    """The model with its linears, all but the head and those with this name, in four bits; it computes as it did."""
    for path, linear in linear_layers(model).items():
        if path != "lm_head" and not path.endswith(dense):
            model.set_submodule(path, NF4Linear.quantize(linear.weight, linear.bias, double_quant))
    return model


def fill_(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * values if parameter.dim() > 1 else 0.7 + 0.3 * values)


def randomize_adapters_(model: torch.nn.Module, seed: int = 1) -> None:
    """Give every adapter a nonzero B, or nothing that depends on A would show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            for factor in (p for key, p in layer.adapters.named_parameters() if key.endswith("lora_B")):
                factor.copy_(0.3 * torch.randn(factor.shape, generator=generator, dtype=torch.float64))


def trained_of(adapter: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trained tensors of an adapter, `lora_A` and the others, also of one that starts as a part of W."""
    return {name.rpartition(".")[2]: parameter for name, parameter in adapter.named_parameters()}


def perturb_(model: torch.nn.Module, seed: int = 0) -> None:
    """Move everything that is trained, as if it had learned."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def set_dropout_step(model: torch.nn.Module, seed: int | None, step: int = 0) -> None:
    seed_dropout(adapters_with_dropout(model), seed, step)


def train_a_little(model: torch.nn.Module, ids: Tensor, steps: int = 3) -> None:
    """Some steps of AdamW away from the logits that there are, with a generous rate."""
    set_dropout_step(model, 0, 0)
    target = model(ids).detach() + 1
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(steps):
        set_dropout_step(model, 0, step)
        optimizer.zero_grad()
        (model(ids) - target).square().mean().backward()
        optimizer.step()


def allocated(work: Callable[[], Any], mapped: int | None = None) -> tuple[int, int, Any]:
    """What some work has allocated and not freed, the most that it had at a time, and the result.

    A mapped file, of so many bytes, is no part of it. What was allocated before the work counts for nothing if it is
    freed in it: the profiler may take it for memory of an earlier profile that had the same address.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as observed:
        result = work()
    pending = list(observed.profiler.kineto_results.experimental_event_tree())
    events = []
    while pending:
        event = pending.pop()
        pending += event.children
        if event.name == "[memory]":
            events.append(event)
    held: dict[int, int] = {}  # sizes by address
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_time_ns):
        change = event.extra_fields
        if change.alloc_size < 0:
            live -= held.pop(change.ptr, 0)
        elif change.alloc_size != mapped:
            held[change.ptr] = change.alloc_size
            live += change.alloc_size
        most = max(most, live)
    return live, most, result


def small_tiles(patch: Any, numbers: int) -> None:
    """Make kernels take so few at a time, on any number of threads."""
    patch.setattr(tiles, "TILE", numbers)
    patch.setattr(packed, "DENSE_TILE", numbers)
    patch.setattr(torch, "get_num_threads", lambda: 1)


def examples(share: float) -> settings:
    """Draw a share of the profile's number of examples, at least two: for a test whose example is a whole run."""
    return settings(max_examples=max(2, round(share * settings.default.max_examples)))


def long(*values: Any) -> list[Any]:
    """Values of a test's parameter, or tuples of several parameters, that only the long form tries."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.long) for value in values
    ]


def matrix(step: int, **values: Any) -> pytest.MarkDecorator:
    """Run a test for all combinations of its parameters' values, by default for every `step`-th of them.

    A step without a factor in common with the numbers of values meets all values, and most pairs of them.
    """
    combinations = [
        pytest.param(*each, id="-".join(map(str, each)), marks=pytest.mark.long if i % step else ())
        for i, each in enumerate(itertools.product(*values.values()))
    ]
    return pytest.mark.parametrize(
        tuple(values), combinations, indirect=[name for name in values if name == "_kernels"]
    )


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let PyTorch make tensors of this dtype where none is named."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def best_of_rank(matrix: Any, r: int) -> tuple[Any, Any]:
    """The best approximation of a rank, and all singular values, by numpy."""
    U, sigma, Vh = np.linalg.svd(np.asarray(matrix, dtype=np.float64), full_matrices=False)
    return (U[:, :r] * sigma[:r]) @ Vh[:r], sigma


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def token_ids(seed: int, *shape: int, high: int = SIZES["vocab_size"]) -> Tensor:
    return torch.randint(high, shape, generator=generator(seed))


sizes = st.integers(1, 9)
seeds = st.integers(0, 10_000)
bases = st.sampled_from([lambda model: model, four_bit])
scales = st.sampled_from([0.25, 0.5, 2.0, 7.0])  # never 1, which would hide a lost factor
document_lengths = st.lists(st.integers(1, 9), min_size=1, max_size=4)
