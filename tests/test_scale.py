"""What one of several ranks holds, computes and sends, by the formulas, against tensors and operations counted."""

import itertools
import json
import re
import subprocess
from dataclasses import replace
from itertools import combinations_with_replacement
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import minilora as ml
from benchmarks import results, work
from benchmarks import scale as script
from minilora import cli
from minilora.cli import forecast as pages
from minilora.cli.flags import names_of
from minilora.data import Batch
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.config import parse_config
from minilora.runs.config import TrainConfig
from minilora.runs.memory import amount, forecast
from minilora.runs.objective import Objective, build_optimizer
from minilora.runs.sizes import BLOCKS, Plan, base_bytes, forecast_step, parameter_shapes
from minilora.training import train_step
from tests.models import WHOLE, Operations, four_bit, long, tiny_config, tiny_model

CPU = torch.device("cpu")
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
T, M = 33, 11  # tokens of a document, and labelled ones
ADAPTERS = {
    "none": None,
    "all": ml.LoraConfig(r=4),
    "values": ml.LoraConfig(r=4, target_modules=["v_proj"]),
    "last layers": ml.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], layers_to_transform=[2, 3]),
    "head": ml.LoraConfig(r=4, target_modules=["down_proj"], modules_to_save=["lm_head"]),
    "adapted head": ml.LoraConfig(r=4, target_modules=["o_proj", "lm_head"]),
}


def plan(config, lora=None, quantize="none", dtype=torch.float32, world=1, shard="none", **training):
    training = TrainConfig(batch_size=1, **training)
    return Plan(config, lora, training, QuantizeConfig(quantize), dtype, CPU, [(T, M)] * 9, world=world, shard=shard)


def model_of(quantize, dtype=torch.bfloat16):
    model = tiny_model(dtype=dtype)
    return four_bit(model, quantize == "double") if quantize != "none" else model


# --- bytes of a rank ---


@pytest.mark.parametrize("quantize", ["none", "nf4", "double"])
@pytest.mark.parametrize("world", [1, 2, 3, 7, 64])
def test_a_rank_holds_the_first_chunk_of_each_tensor_of_a_block_and_the_others_whole(quantize, world):
    model = model_of(quantize)
    held, blocks = 0, dict.fromkeys(range(model.config.num_hidden_layers), 0)
    for name, tensor in model.named_parameters():
        first = tensor.chunk(world)[0] if name.startswith(BLOCKS) else tensor
        held += first.nbytes
        if name.startswith(BLOCKS):
            blocks[int(name.split(".")[2])] += world * first.nbytes
    found = base_bytes(
        model.config,
        QuantizeConfig("none" if quantize == "none" else "nf4", quantize == "double"),
        torch.bfloat16,
        parameter_shapes(model.config),
        world,
    )
    assert (found.held, found.blocks) == (held, list(blocks.values()))


def test_a_sharded_base_adds_two_gathered_blocks_and_changes_nothing_else_but_its_weights():
    config = tiny_config()
    one_plan = plan(config, ml.LoraConfig())
    one = forecast(one_plan)
    assert forecast(plan(config, ml.LoraConfig(), world=4)) == one
    sharded = plan(config, ml.LoraConfig(), world=4, shard="base")
    base = base_bytes(config, sharded.quantization, sharded.dtype, parameter_shapes(config), 4)
    expected = replace(one, weights=base.held, working=one.working + 2 * max(base.blocks))
    assert forecast(sharded) == expected
    recomputed = [
        forecast(replace(each, training=replace(each.training, gradient_checkpointing="block")))
        for each in (one_plan, sharded)
    ]
    assert recomputed[1].overhead < recomputed[0].overhead  # there are no holes
    assert base.held < one.weights
    assert forecast(replace(sharded, world=1)) == one  # nothing is gathered


# --- bytes on the wire ---


@pytest.fixture
def ranks():
    """A group of four ranks of which there is one: what it sends goes nowhere."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield 4
    distributed.destroy_process_group()


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_the_weights_that_are_gathered_are_those_that_fsdp_gathers(ranks, quantize, checkpointing):
    model = model_of(quantize, torch.float32)
    mesh = distributed.init_device_mesh("cpu", (ranks,))
    for block in model.model.layers.requires_grad_(False):
        fully_shard(block, mesh=mesh)
    rest = {*model.model.embed_tokens.parameters(), *model.model.norm.parameters()}
    fully_shard(model.model, mesh=mesh, ignored_params=rest)
    model.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(True)  # so that there is a backward pass through all blocks
    with Operations() as operations:
        loss = model.model(torch.ones(T, dtype=torch.long), [T], checkpointing=checkpointing).sum()
        loss.backward()
    planned = plan(
        model.config, ml.LoraConfig(), quantize, world=ranks, shard="base", gradient_checkpointing=checkpointing
    )
    planned = replace(planned, quantization=QuantizeConfig(quantize, double_quant=False))
    gather = torch.ops.c10d._allgather_base_.default
    received = sum(args[0].nbytes for func, args, _ in operations.seen if func is gather)  # the rank's own included
    assert forecast_step(planned).gathered * ranks == received * (ranks - 1)


def ring(sizes):
    """Bytes that each rank sends to add a buffer of float32, cut into these parts, part by part around a ring."""
    N = len(sizes)
    return [
        4 * sum(sizes[(rank - turn) % N] + sizes[(rank + 1 - turn) % N] for turn in range(N - 1)) for rank in range(N)
    ]


@pytest.mark.parametrize("world", [1, 2, 5])
def test_the_gradients_of_an_adapter_are_sent_as_a_ring_sends_them(world):
    model = tiny_model(dtype=torch.float32)
    ml.attach(model, ml.LoraConfig(r=5))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained % world == 0
    found = forecast_step(plan(model.config, ml.LoraConfig(r=5), world=world))
    assert {found.reduced} == {*ring([trained // world] * world)}
    assert found.gathered == 0


def test_a_rank_has_a_share_of_the_micro_batches_rounded_up():
    config, lora = tiny_config(), ml.LoraConfig()
    one = forecast_step(plan(config, lora, world=3, shard="base"))
    for count, share in ((1, 1), (3, 1), (4, 2), (9, 3)):
        many = forecast_step(plan(config, lora, world=3, shard="base", gradient_accumulation_steps=count))
        assert (many.flop, many.gathered, many.reduced) == (share * one.flop, share * one.gathered, one.reduced)


# --- FLOP ---


def counted(model, training):
    """FLOP of matrix products of a step of the plain definitions; attention is one operation, which does not count."""
    ones = torch.ones(T, dtype=torch.int64)
    optimizer, batch = build_optimizer(model, training), Batch(ones, [T], torch.arange(T - M, T), ones[:M])
    with ml.plain(), FlopCounterMode(display=False) as counter:
        train_step(model, optimizer, [batch], Objective(training))
    return counter.get_flop_counts()["Global"][torch.ops.aten.mm]


def attention_flop(config, again, learns):
    """Two products forward, and five backward, of 2 FLOP a number of a head, for each pair of positions."""
    pairs = len([*combinations_with_replacement(range(T), 2)])
    width = config.num_attention_heads * config.head_dim
    return sum(2 * width * pairs * (2 + 2 * again + 5 * backward) for backward in learns)


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_flop_are_those_that_a_plain_step_counts(name):
    model, lora, training = tiny_model(dtype=torch.float32), ADAPTERS[name], TrainConfig(batch_size=1)
    if lora is not None:
        ml.attach(model, lora)
    learns = {"last layers": [0, 0, 1, 1], "head": [0, 1, 1, 1], "adapted head": [0, 1, 1, 1]}.get(name, [1] * 4)
    expected = counted(model, training) + attention_flop(model.config, False, learns)
    assert forecast_step(plan(model.config, lora)).flop == expected


@pytest.mark.parametrize("checkpointing", ["mlp", "block"])
@pytest.mark.parametrize("name", ["none", "all", "values"])
def test_what_is_recomputed_counts_again(name, checkpointing):
    model, lora = tiny_model(dtype=torch.float32), ADAPTERS[name]
    config, training = model.config, TrainConfig(batch_size=1, gradient_checkpointing=checkpointing)
    if lora is not None:
        ml.attach(model, lora)
    # Without the kernel, the last product, u Bᵀ, is not recomputed, as nothing needs it.
    last = (name == "all") * 2 * T * 4 * config.hidden_size * config.num_hidden_layers
    expected = counted(model, training) + last + attention_flop(config, checkpointing == "block", [1] * 4)
    assert forecast_step(plan(config, lora, gradient_checkpointing=checkpointing)).flop == expected


def test_a_window_leaves_out_what_is_farther_back():
    config = tiny_config()
    narrow, wide = (replace(config, windows=(window,) * 4) for window in (5, T))
    flop = [forecast_step(plan(each, ml.LoraConfig())).flop for each in (narrow, wide, config)]
    assert flop[1] == flop[2]
    pairs = sum(min(t, T) - min(t, 5) for t in range(1, T + 1))
    assert flop[1] - flop[0] == 14 * 4 * config.num_attention_heads * config.head_dim * pairs


def test_flop_are_those_of_the_benchmarks_but_for_what_these_round():
    """The benchmarks count T²/2 pairs, and the gradient of the first block's input."""
    config, lora = parse_config(work.SMOLLM2), ml.LoraConfig(r=work.RANK)
    D, K = config.hidden_size, config.num_key_value_heads * config.head_dim
    found = forecast_step(replace(plan(config, lora), rows=[(T, T - 1)])).flop
    theirs = work.training_flops(work.SMOLLM2, [([1] * T, [1] * T)])
    first = 2 * T * (D * (D + 2 * K) + 3 * work.RANK * D)
    assert found == theirs + config.num_hidden_layers * 7 * D * T - first


# --- the pages ---


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A config.json, whose page has no table of models of known sizes."""
    monkeypatch.setattr(pages, "SHAPES", {})
    source = {key: value for key, value in tiny_config(WHOLE).source.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(source))
    return tmp_path


def rows_of(page, head):
    """The cells of the table after the line with this first cell, by row."""
    lines = iter(page.splitlines())
    for line in lines:
        if line.split() and line.split()[0] == head:
            break
    rows = itertools.takewhile(lambda row: row[2:3].isalpha(), lines)
    return {row[:17].strip(): re.split(r"  +", row[17:].strip()) for row in rows}


def test_inspect_shows_the_terms_of_a_rank_and_of_its_step(directory, capsys):
    flags = ["--memory", "--world", "4", "--shard", "base", "--gemm-rate", "1e9", "--bandwidth", "2e6"]
    assert cli.main(["inspect", str(directory), *flags]) == 0
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 120
    config = parse_config(json.loads((directory / "config.json").read_text()))
    held, steps = rows_of(page, "weights"), rows_of(page, "FLOP")
    for way in pages.WAYS[1:]:  # a full fine-tune has no frozen base
        planned = pages.default_plan(config, way, pages.pick_device("auto"), 4, "base")
        found, step = forecast(planned), forecast_step(planned)
        assert held[way] == [amount(value) for value in (*vars(found).values(), found.peak)]
        seconds = f"{step.seconds(1e9, 2e6):.3g}"
        assert steps[way] == [f"{step.flop:.3g}", amount(step.reduced), amount(step.gathered), seconds]
        assert step.gathered > 0
        assert planned.training.gradient_accumulation_steps == 4  # a batch a rank
    assert cli.main(["inspect", str(directory), *flags[:3]]) == 0
    assert "seconds" not in capsys.readouterr().out  # without rates


@pytest.mark.parametrize(
    ("flags", "phrase"),
    [
        (["--shard", "base"], "give --world, too"),
        (["--gemm-rate", "1", "--bandwidth", "1"], "give --world, too"),
        (["--world", "2", "--gemm-rate", "1e9"], "give both"),
        (["--world", "2", "--bandwidth", "1e9"], "give both"),
        (["--world", "0"], "must be above 0"),
        (["--world", "2", "--gemm-rate", "0"], "must be above 0"),
        (["--world", "2", "--bandwidth", "nan"], "must be above 0"),
    ],
)
def test_flags_of_ranks_that_lack_others_or_cannot_be_are_refused(directory, capsys, flags, phrase):
    assert cli.main(["inspect", str(directory), "--memory", *flags]) == 1
    assert phrase in capsys.readouterr().err


def test_a_gpu_is_forecast_where_there_is_none(directory, capsys):
    assert cli.main(["inspect", str(directory), "--memory", "--device", "cuda"]) == 0
    page = capsys.readouterr().out
    assert "on cuda in bfloat16" in page
    config = parse_config(json.loads((directory / "config.json").read_text()))
    plans = [pages.default_plan(config, "QLoRA, block", device) for device in (torch.device("meta"), CPU)]
    kept = [forecast(plan).overhead for plan in plans]
    assert kept[0] < kept[1]
    assert rows_of(page, "weights")["QLoRA, block"][-2] == amount(kept[0])


@pytest.mark.parametrize("name", ["fits", *long("paper")])
def test_the_tables_of_the_page_are_those_of_the_script(name):
    make, head = script.WORKS[name]
    table = results.table(head.split(" | "), make())
    assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in PAGE.read_text(encoding="utf-8")


def test_the_tokens_at_which_traffic_is_hidden_are_those_of_the_page():
    """2 S / bandwidth = 6 P T / gemm_rate."""
    tokens = [2 * size / script.BANDWIDTH * script.GEMM_RATE / 6 for size in (2, 0.52)]
    assert "T ≥ 5,300 tokens and an nf4 base (S ≈ 0.52 P) 1,400" in PAGE.read_text(encoding="utf-8").replace("\n", " ")
    assert [round(each, -2) for each in tokens] == [5300, 1400]


def test_the_scripts_of_the_page_are_shell_and_give_flags_that_there_are():
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    known = names_of(cli.command_parser("finetune"))
    assert len(blocks) == 6
    for block in blocks:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        command = block.partition("-m minilora finetune")[2]
        assert {name.replace("-", "_") for name in re.findall(r"--([\w-]+)", command)} <= known


def test_the_manifest_of_the_page_is_yaml_and_gives_flags_that_there_are():
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1])
    pod = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {each["name"] for each in pod["volumes"]} == {each["name"] for each in container["volumeMounts"]}
    words = container["command"][container["command"].index("finetune") :]
    cli.parse(words)
    policy, ranks = manifest["spec"]["elasticPolicy"], container["resources"]["limits"]["nvidia.com/gpu"]
    assert policy["minReplicas"] == policy["maxReplicas"]
    assert f"--nproc-per-node={ranks}" in container["command"]
    assert f"--gradient-accumulation-steps={ranks * policy['maxReplicas']}" in words
