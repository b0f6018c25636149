"""What one of several ranks holds, against the tensors of a model; the pages and scripts of many processes."""

import json
import re
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import minilora as ml
from benchmarks import results
from benchmarks import scale as script
from minilora import cli
from minilora.cli import forecast as pages
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.config import parse_config
from minilora.models.shard import avoid_scalars
from minilora.nf4 import NF4Linear
from minilora.runs.config import TrainConfig
from minilora.runs.memory import Plan, amount, forecast
from tests.models import WHOLE, four_bit, tiny_config, tiny_model
from tests.runs import flags_of

CPU = torch.device("cpu")
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
T, M = 33, 11  # tokens of a document, and labelled ones


def plan(config, lora, quantize="none", dtype=torch.float32, world=1, shard="none"):
    quantization = QuantizeConfig("none" if quantize == "none" else "nf4", quantize == "double")
    return Plan(config, lora, TrainConfig(batch_size=1), quantization, dtype, CPU, [(T, M)], world=world, shard=shard)


def model_of(quantize, dtype=torch.bfloat16):
    model = tiny_model(dtype=dtype)
    return four_bit(model, quantize == "double") if quantize != "none" else model


# --- bytes of a rank ---


@pytest.mark.parametrize("quantize", ["none", "nf4", "double"])
@pytest.mark.parametrize("world", [1, 2, 3, 7, 64])
def test_a_rank_holds_the_first_chunk_of_each_tensor_of_a_block_and_the_others_whole(quantize, world):
    model = model_of(quantize)
    for module in model.modules():
        if isinstance(module, NF4Linear):
            avoid_scalars(module)
    firsts = (
        tensor.chunk(world)[0] if name.startswith("model.layers.") else tensor
        for name, tensor in model.named_parameters()
    )
    planned = plan(model.config, ml.LoraConfig(), quantize, torch.bfloat16, world, "base")
    assert forecast(planned).weights == sum(first.nbytes for first in firsts)


def test_a_sharded_base_adds_two_gathered_blocks_and_changes_nothing_else_but_its_weights():
    config, model = tiny_config(), tiny_model(dtype=torch.float32)
    one = forecast(plan(config, ml.LoraConfig()))
    assert forecast(plan(config, ml.LoraConfig(), world=4)) == one
    sharded = forecast(plan(config, ml.LoraConfig(), world=4, shard="base"))
    gathered = 2 * max(sum(4 * p.chunk(4)[0].nbytes for p in block.parameters()) for block in model.model.layers)
    assert sharded.working == one.working + gathered
    assert sharded.weights < one.weights
    assert replace(sharded, weights=0, working=0, overhead=0) == replace(one, weights=0, working=0, overhead=0)
    alone = plan(config, ml.LoraConfig(), world=1, shard="base")
    assert forecast(alone) == one  # nothing is gathered


# --- the pages ---


@pytest.mark.parametrize("shard", ["none", "base"])
def test_inspect_shows_the_terms_of_a_rank(tmp_path, capsys, shard):
    source = {key: value for key, value in tiny_config(WHOLE).source.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(source))
    assert cli.main(["inspect", str(tmp_path), "--memory", "--world", "4", "--shard", shard]) == 0
    page = capsys.readouterr().out
    assert f"of one of 4 ranks with --shard {shard}\n" in page
    for method in ("full fine-tune", "LoRA"):
        planned = pages.default_plan(parse_config(source), method, pages.pick_device("auto"), 4, shard)
        assert planned.training.gradient_accumulation_steps == 4  # a batch a rank
        found = forecast(planned)
        row = next(line for line in page.splitlines() if line.startswith(f"  {method}  "))
        assert re.split(r"  +", row.strip())[1:] == [amount(value) for value in (*vars(found).values(), found.peak)]


def test_the_table_of_the_page_is_that_of_the_script():
    make, head = script.WORKS["fits"]
    table = results.table(head.split(" | "), make())
    assert f"<!-- fits -->\n{table}\n<!-- /fits -->" in PAGE.read_text(encoding="utf-8")


def test_the_scripts_of_the_page_are_shell_and_they_and_its_manifest_give_flags_that_there_are():
    blocks = re.findall(r"```(bash|yaml)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert Counter(language for language, _ in blocks) == {"bash": 6, "yaml": 1}
    for language, block in blocks:
        if language == "bash":
            subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        command = re.split(r"\bfinetune\b", block)[1]
        assert {name.replace("-", "_") for name in re.findall(r"--([\w-]+)", command)} <= flags_of("finetune")
