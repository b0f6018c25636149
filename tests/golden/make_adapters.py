"""Adapters as PEFT writes them, with the logits that PEFT computes: `python -m tests.golden.make_adapters`.

Each case is a directory that PEFT saved, and `logits.safetensors` beside its files. Needs the extra `parity`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import minilora as ml
from tests.models import fill_, tiny_model, token_ids

FOLDER = Path(__file__).parent / "adapters"
IDS = token_ids(3, 2, 7)


class Layers(nn.Module):
    """One of each layer that no decoder of ours has.

    Args:
        conv1d: transformers' Conv1D, or what does the same.
    """

    def __init__(self, conv1d: Callable[[int, int], nn.Module]):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(61, 6), conv1d(8, 6), nn.Linear(8, 9)
        fill_(self, 0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(ids)).tanh())


BIASED = ("llama-bias-tied-wide-heads", {"num_hidden_layers": 2, "tie_word_embeddings": False})
TIED = ("llama-bias-tied-wide-heads", {"num_hidden_layers": 2})
# the base, a family of `tests.models` and changes to it or `Layers`; fields of PEFT's config
CASES: dict[str, tuple[tuple[str, dict[str, Any]] | None, dict[str, Any]]] = {
    "plain": (("llama", {}), {"target_modules": ["q_proj", "v_proj"]}),
    "all-linear-rslora": (("llama", {}), {"target_modules": "all-linear", "use_rslora": True}),
    "patterns": (
        ("llama", {}),
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 1},
            "alpha_pattern": {"up_proj": 5},
        },
    ),
    "head": (("llama", {}), {"target_modules": ["lm_head", "o_proj"]}),
    "dora": (BIASED, {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "use_rslora": True}),
    "biases": (BIASED, {"target_modules": ["q_proj"], "bias": "all", "lora_bias": True}),
    "modules-to-save": (
        BIASED,
        {"target_modules": ["v_proj"], "bias": "all", "modules_to_save": ["lm_head", "o_proj"]},
    ),
    "token-rows": (TIED, {"target_modules": ["v_proj"], "trainable_token_indices": [45, 2, 18]}),
    "pissa": (BIASED, {"target_modules": ["k_proj", "up_proj"], "init_lora_weights": "pissa"}),
    "olora": (BIASED, {"target_modules": ["k_proj", "up_proj"], "init_lora_weights": "olora"}),
    "layers": (None, {"target_modules": ["embed", "mix"], "bias": "lora_only"}),
    "layers-dora": (None, {"target_modules": ["embed", "mix"], "use_dora": True}),
}


def base_of(case: str, conv1d: Callable[[int, int], nn.Module]) -> nn.Module:
    """The model that the adapter is for."""
    base = CASES[case][0]
    return Layers(conv1d).eval() if base is None else tiny_model(base[0], dtype=torch.float32, **base[1])


def main() -> None:
    import peft
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    shutil.rmtree(FOLDER, ignore_errors=True)
    for case, (base, fields) in CASES.items():
        model = base_of(case, Conv1D)
        if base is not None:
            with tempfile.TemporaryDirectory() as directory:
                ml.save_model(model, directory)
                model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
            model.name_or_path = model.config._name_or_path = ""  # the directory is gone
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "lora_alpha": 14, **fields})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn(parameter.shape)
            model.save_pretrained(FOLDER / case)
            logits = model(IDS)
        path = FOLDER / case / "adapter_config.json"
        values = json.loads(path.read_text())
        values["target_modules"].sort()  # PEFT's order is another in every process
        path.write_text(json.dumps(values, indent=2))
        (FOLDER / case / "README.md").unlink()
        save_file({"logits": getattr(logits, "logits", logits)}, FOLDER / case / "logits.safetensors")


if __name__ == "__main__":
    main()
