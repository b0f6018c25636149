"""What is measured: models, rows of tokens, and one data class for each kind of work.

    D  hidden_size    F  intermediate_size    V  vocab_size    r  rank    T  tokens of a document

Lengths of rows, three kinds of them:
    fixed  4 rows of 512 tokens, all learned
    real   8 rows, lognormal of median 110 and σ 0.6, cut to 20..512, the second half of each learned
    long   1 document of 4,096 tokens, all learned
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

IGNORE_INDEX = -100
RANK, ALPHA = 16, 32
LEARNING_RATE, MAX_GRAD_NORM = 2e-4, 1.0
WARM_UP, STEPS = 2, 5
ANSWERED = 16  # tokens of an answer
KEPT = {"MALLOC_MMAP_THRESHOLD_": f"{2**25}", "MALLOC_TRIM_THRESHOLD_": f"{2**62}"}  # of glibc: freed memory is kept
SMOLLM2 = {  # SmolLM2-135M
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
}
OURS = "minilora"
Kind = Literal["fixed", "real", "long"]
Method = Literal["lora", "dora", "qlora"]
Row = tuple[list[int], list[int]]  # tokens, labels


@dataclass(frozen=True)
class Training:
    """Steps of AdamW on an adapter."""

    name: str
    dtype: str
    kind: Kind
    method: Method = "lora"
    recompute: bool = False
    peers: tuple[str, ...] = ("peft",)

    @property
    def batch_size(self) -> int:
        return {"fixed": 4, "real": 8, "long": 1}[self.kind]

    @property
    def bounds(self) -> dict[str, float]:
        """How far, relative to the peer's, the first step's loss and gradient norm, and the last loss, may be apart.

        Both compute in `dtype` and round at other places; bfloat16 has 8 bits. Last losses are alike where gradients
        were, number by number: AdamW goes by their signs.
        """
        loss, norm, last = (1e-4, 1e-3, 1e-3) if self.dtype == "float32" else (2e-3, 2e-2, 5e-3)
        return {"loss": loss, "gradient norm": norm, "last loss": last}


@dataclass(frozen=True)
class Ablation:
    """A work of training without each of our tricks."""

    name: str
    training: str


Work = Training | Ablation


@dataclass(frozen=True)
class Task:
    """A work as a side is given it: where model and adapter to begin with are, and the rows, of which it needs some."""

    work: Any
    model: Path
    adapter: Path
    device: str
    rows: Sequence[Row] = ()
    batches: Sequence[list[Row]] = ()  # the same rows, as minilora's loop takes them in turn
    warm_up: int = 0
    side: str = OURS


def trainings() -> list[Training]:
    """All works of training; the first seven are those of the README."""
    everyone = ("peft", "peft-kept", "trl", "trl-best")
    real = (*everyone, "peft-grouped")
    bf16, fp32 = "bfloat16", "float32"
    return [
        Training("bf16-fixed", bf16, "fixed", peers=everyone),
        Training("bf16-fixed-recompute", bf16, "fixed", recompute=True),
        Training("bf16-real", bf16, "real", peers=real),
        Training("fp32-fixed", fp32, "fixed"),
        Training("fp32-real", fp32, "real"),
        Training("qlora-fixed-recompute", bf16, "fixed", "qlora", recompute=True),
        Training("dora-fixed", bf16, "fixed", "dora"),
        Training("bf16-long-recompute", bf16, "long", recompute=True),
        Training("qlora-fixed", bf16, "fixed", "qlora", peers=("lora", "peft")),
    ]


def ablations() -> list[Ablation]:
    """The works that show what each of our tricks buys."""
    names = ("bf16-fixed", "bf16-real", "fp32-fixed", "qlora-fixed-recompute")
    return [Ablation(f"ablation-{name}", name) for name in names]


def works() -> list[Work]:
    """Everything that is measured."""
    return [*trainings(), *ablations()]


def rows(kind: Kind, count: int, vocabulary: int) -> list[Row]:
    """Random tokens, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    if kind == "real":
        spread = torch.randn(count, generator=generator)
        lengths = (110 * (0.6 * spread).exp()).round().clamp(20, 512).int().tolist()
    else:
        lengths = [{"fixed": 512, "long": 4096}[kind]] * count
    found = []
    for length in lengths:
        tokens = torch.randint(vocabulary, (length,), generator=generator).tolist()
        asked = length // 2 if kind == "real" else 0
        found.append((tokens, [IGNORE_INDEX] * asked + tokens[asked:]))
    return found


def labelled(batch: Sequence[Row]) -> int:
    """How many tokens are learned; a row's first is never predicted."""
    return sum(label != IGNORE_INDEX for _, labels in batch for label in labels[1:])


def training_flops(config: dict[str, Any], batch: Sequence[Row], rank: int = RANK) -> float:
    """FLOP of the forward and backward passes of LoRA, without what is computed again to save memory.

    A frozen linear (n, m) with an adapter takes T (4 m n + 6 r (m + n)): forward, the gradient of its input, and the
    adapter's own; the head 4 V D a labelled token. Causal attention of a document has T²/2 pairs of positions, and 7
    products of 2 FLOP a pair and dimension, as they are usually counted: 2 forward and 5 backward, of which one makes
    the probabilities again, which nobody keeps.
    """
    lengths = [len(tokens) for tokens, _ in batch]
    D, F, V = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    E = config.get("head_dim") or D // config["num_attention_heads"]
    Q, K = config["num_attention_heads"] * E, config["num_key_value_heads"] * E
    linears = [(Q, D), (K, D), (K, D), (D, Q), (F, D), (F, D), (D, F)]
    a_token = sum(4 * m * n + 6 * rank * (m + n) for n, m in linears)
    attention = sum(7 * Q * T * T for T in lengths)
    return config["num_hidden_layers"] * (a_token * sum(lengths) + attention) + 4.0 * V * D * labelled(batch)


def config_of(directory: Path) -> dict[str, Any]:
    """A model's config.json."""
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))
