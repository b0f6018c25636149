"""Adapters as PEFT writes them, with the logits that PEFT computes: `python -m tests.golden.make_adapters`.

Each case is a directory that PEFT saved, and `logits.safetensors` beside its files. Needs the extra `parity`.
"""

import json
import shutil
import tempfile
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import minilora as ml
from tests.models import tiny_model, token_ids

FOLDER = Path(__file__).parent / "adapters"
CASES = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear-rslora": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 1},
        "alpha_pattern": {"up_proj": 5},
    },
    "head": {"target_modules": ["lm_head", "o_proj"]},
}


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    for case, fields in CASES.items():
        with tempfile.TemporaryDirectory() as base:
            ml.save_model(tiny_model(dtype=torch.float32), base)
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "lora_alpha": 14, **fields})).eval()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        model.save_pretrained(FOLDER / case)
        config = FOLDER / case / "adapter_config.json"
        config.write_text(config.read_text().replace(json.dumps(base), "null"))  # a directory that is gone
        (FOLDER / case / "README.md").unlink()
        with torch.no_grad():
            save_file({"logits": model(token_ids(3, 2, 7)).logits}, FOLDER / case / "logits.safetensors")


if __name__ == "__main__":
    main()
