"""Memory that is forecast against memory that is taken: by tensors and by the process; what fits, and what does not."""

import json
import re
import sys
from dataclasses import replace
from datetime import datetime
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora import cli
from minilora.cli import dry_run as pages
from minilora.cli.finetune import find_inputs, plan_run
from minilora.data import Batch
from minilora.kernels import llama as heads
from minilora.kernels import llama as tiles
from minilora.kernels.attention import MetaAttention, causal_attention
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.checkpoint import build_model
from minilora.models.config import parse_config
from minilora.models.delta_rule import SIZES as LINEAR_SIZES
from minilora.runs import memory as forecasts
from minilora.runs import memory as host
from minilora.runs.inputs import read_data
from minilora.runs.loop import build_optimizer
from minilora.runs.memory import MemoryCounter, Plan, amount, choose_plan, free_memory_bytes, peak_memory_bytes
from minilora.runs.settings import RunConfig, Settings, TrainConfig
from minilora.training import token_loss, train_step
from tests.models import (
    CONFIGS,
    FAMILIES,
    WHOLE,
    examples,
    fill_,
    four_bit,
    long,
    set_dropout_step,
    tiny_config,
    tiny_model,
)
from tests.runs import SETTINGS, words
from tests.training import random_rows

CPU = torch.device("cpu")
WAYS = ("none", "mlp", "block")
FIELDS = ("weights", "adapters", "gradients", "moments", "activations", "working", "overhead")


def plan(
    config,
    lora=None,
    lengths=(7, 5, 9),
    labelled=11,
    quantize="none",
    dtype=torch.float32,
    ranks=1,
    shard="none",
    **more,
):
    rows = [(lengths[0], labelled), *((n, 0) for n in lengths[1:])]
    quantization = QuantizeConfig("none" if quantize == "none" else "nf4", quantize != "single")
    return Plan(config, lora, TrainConfig(batch_size=len(rows), **more), quantization, dtype, CPU, rows, ranks, shard)


def forecast(plan):
    return forecasts.forecast(plan)[plan.training.gradient_checkpointing]


# --- tensors ---


def live_bytes(model, config, lengths, labelled):
    """The most bytes of tensors that live in a step that is not the first."""
    optimizer, loss = build_optimizer(model, config), partial(token_loss, checkpointing=config.gradient_checkpointing)
    ones = torch.ones(sum(lengths), dtype=torch.int64)
    batch = Batch(ones, lengths, torch.arange(labelled), ones[:labelled])
    set_dropout_step(model, 0)
    train_step(model, optimizer, [batch], loss)
    optimizer.zero_grad()
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    held = {t.untyped_storage()._cdata: t for t in (*model.parameters(), *model.buffers(), *moments)}.values()
    with MemoryCounter(held) as live:
        train_step(model, optimizer, [batch], loss)
    return live.most + sum(tensor.untyped_storage().nbytes() for tensor in held)


def test_the_most_that_lives_is_counted_once_a_storage_without_what_was_there():
    known = torch.zeros(1000)
    with MemoryCounter([known]) as live:
        first = known + 1  # 4,000 bytes
        second = torch.cat([first, first.view(10, 100).flatten()])  # and 8,000
        del first
        third = second + known.sum()  # 8,000 in place of 4,000, and a number
        del second, third
    assert live.most == 16_004
    assert live.now == 0


@st.composite
def shapes(draw):
    """A config.json with sizes in the proportions of real ones, and small."""
    K, E = draw(st.integers(1, 3)), draw(st.sampled_from([16, 32]))
    H = K * draw(st.integers(1, 3))
    sizes = {"num_key_value_heads": K, "num_attention_heads": H, "head_dim": E, "hidden_size": H * E}
    sizes |= {"intermediate_size": H * E * draw(st.integers(3, 4)), "num_hidden_layers": draw(st.integers(2, 4))}
    sizes |= dict(zip(LINEAR_SIZES, (K, H, E, E, 4), strict=True))
    family = draw(st.sampled_from(["llama", "qwen3", WHOLE, "qwen3.5"]))
    return tiny_config(family, **sizes, vocab_size=draw(st.sampled_from([200, 3000])), sliding_window=None)


adapters = st.builds(
    ml.LoraConfig,
    r=st.sampled_from([2, 8, 16]),
    use_dora=st.booleans(),
    lora_dropout=st.sampled_from([0.0, 0.0, 0.1]),
    target_modules=st.sampled_from(["all-linear", "all-linear", r".*(q|qkv|v|gate|gate_up)_proj"]),
)


@examples(0.5)
@given(
    shapes(),
    st.none() | adapters,
    st.sampled_from(["none", "nf4"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(WAYS),
    st.lists(st.integers(100, 300), min_size=2, max_size=6),
    st.floats(0.2, 1),
)
def test_the_forecast_of_tensors_is_within_5_percent_of_the_peak_of_a_step(
    config, lora, quantize, dtype, checkpointing, lengths, share
):
    """With tiles and chunks of rows as small beside the model as they are beside a real one."""
    dtype, quantize = (torch.float32, "none") if lora is None else (dtype, quantize)
    labelled = max(1, int(share * sum(lengths)))
    model = build_model(config).to(dtype)
    model.tie_weights()
    fill_(model, 0)
    if quantize == "nf4":
        four_bit(model)
    if lora is not None:
        ml.attach(model, lora)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "tile_size", lambda device: 2**14)
        patch.setattr(heads, "HEAD_LOGITS", 2**18)
        planned = plan(config, lora, lengths, labelled, quantize, dtype, gradient_checkpointing=checkpointing)
        taken = live_bytes(model, planned.training, lengths, labelled)
        found = forecast(planned)
        assert abs((found.peak - found.overhead) / taken - 1) <= 0.05, found


def attention_bytes(device, attend, dtype, lengths):
    """Bytes that autograd saves of attention, its inputs and its output included."""
    q, k, v = (
        torch.empty(sum(lengths), heads, 16, dtype=dtype, device=device, requires_grad=True) for heads in (4, 2, 2)
    )
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        note(attend(q, k, v, lengths))
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[5, 9], [40], [600, 7]])
def test_outlined_attention_keeps_what_attention_keeps(dtype, lengths):
    real = attention_bytes(CPU, lambda q, k, v, n: causal_attention(q, k, v, n, n), dtype, lengths)
    outlined = MetaAttention(CPU, lengths)
    assert attention_bytes("meta", lambda q, k, v, n: outlined.attend(q, k, v, None), dtype, lengths) == real


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_gradients_are_those_of_what_attach_makes_trainable(name):
    model, lora = tiny_model(WHOLE, num_hidden_layers=2), ml.LoraConfig(**{"r": 3, **CONFIGS[name]})
    found = forecast(plan(model.config, lora))
    ml.attach(model, lora)
    assert found.gradients == sum(p.nbytes for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_weights_of_every_family_are_those_of_its_parameters(family):
    config = tiny_config(family)
    assert forecast(plan(config, ml.LoraConfig())).weights == sum(p.nbytes for p in build_model(config).parameters())


def test_a_full_fine_tune_holds_sixteen_bytes_a_parameter_and_keep_best_four_more():
    config = tiny_config()
    count = sum(p.numel() for p in build_model(config).parameters())
    found, best = forecast(plan(config)), forecast(plan(config, keep="best", eval_steps=1))
    assert found.weights + found.gradients + found.moments == pytest.approx(16 * count, rel=0.05)
    assert best.peak - found.peak == 4 * count


# --- what one of several ranks holds ---


@pytest.mark.parametrize("quantize", ["none", "single", "double"])
@pytest.mark.parametrize("ranks", [1, 3, *long(2, 7), 64])
def test_a_rank_holds_its_share_of_the_blocks_and_the_rest_whole(quantize, ranks):
    model = tiny_model(dtype=torch.bfloat16, num_hidden_layers=2)
    if quantize != "none":
        four_bit(model, quantize == "double")
    parameters = dict(model.named_parameters())
    blocks = {name for name in parameters if name.startswith("model.layers.")}
    held = sum(p.chunk(ranks)[0].nbytes if name in blocks else p.nbytes for name, p in parameters.items())
    rows = sum(parameters[name][0].nbytes for name in blocks)  # the first rank has one more where a tensor is uneven
    options = {"quantize": quantize, "dtype": torch.bfloat16, "ranks": ranks, "shard": "base"}
    assert held - rows <= forecast(plan(model.config, ml.LoraConfig(), **options)).weights <= held


def test_a_sharded_base_adds_two_gathered_blocks_and_changes_only_its_weights():
    model, lora = tiny_model(dtype=torch.float32, num_hidden_layers=2), ml.LoraConfig()
    one, *same = (forecast(plan(model.config, lora, **more)) for more in ({}, {"ranks": 4}, {"shard": "base"}))
    assert same == [one, one]  # nothing is gathered
    sharded = forecast(plan(model.config, lora, ranks=4, shard="base"))
    gathered = 2 * max(sum(4 * p.chunk(4)[0].nbytes for p in block.parameters()) for block in model.model.layers)
    assert sharded.working == one.working + gathered
    assert sharded.weights < one.weights
    assert replace(sharded, weights=0, working=0, overhead=0) == replace(one, weights=0, working=0, overhead=0)


# --- what fits ---


def test_auto_is_the_fastest_way_that_fits_else_the_leanest(monkeypatch):
    auto = plan(tiny_config(), ml.LoraConfig(), [100] * 4, 100, gradient_checkpointing="auto")
    peaks = [found.peak for found in forecasts.forecast(auto).values()]
    assert peaks == sorted(peaks, reverse=True)
    for free, way in (*zip(peaks, WAYS, strict=True), (None, "none"), (0, "block")):
        monkeypatch.setattr(forecasts, "free_memory_bytes", lambda device, free=free: free)
        chosen, found = choose_plan(auto)
        assert chosen.training.gradient_checkpointing == way
        assert [each.peak for each in found.values()] == peaks


def test_what_fits_is_chosen_by_the_command_alone():
    with pytest.raises(ml.TrainingError, match="'auto' works only in `minilora finetune`; give none, mlp or block"):
        ml.train(tiny_model(), random_rows(0, 2), ml.TrainConfig(gradient_checkpointing="auto"))


def finetune(directory, out, *flags, **changes):
    """The command, with the defaults of everything but general text, which is left out."""
    defaults = dict.fromkeys([*SETTINGS, "force"]) | {"general_data": "none", "samples": 0}
    return cli.main([*words(directory, out, **{**defaults, **changes}), *flags])


def planned(directory, out, dtype="auto", **training):
    """The plan of that command, and its forecasts."""
    where = RunConfig(str(directory / "model"), (str(directory / "rows.jsonl"),), out=str(out), device="cpu")
    settings = Settings(replace(where, general_data="none"), training=TrainConfig(**training))
    settings, base = find_inputs(settings)
    return choose_plan(plan_run(settings, base, read_data(settings, base.adapters, datetime.now()), dtype, CPU))


def cells(row):
    return re.split(r"  +", row.strip())


def test_a_dry_run_tells_each_term_by_checkpointing_and_what_fits(directory, tmp_path, capsys, monkeypatch):
    _, found = planned(directory, tmp_path / "out")
    monkeypatch.setattr(forecasts, "free_memory_bytes", lambda device: found["mlp"].peak)
    assert finetune(directory, tmp_path / "out", "--dry-run", "--force") == 0
    page = capsys.readouterr().out
    head, *rows = page.split("(this run: none)\n")[1].splitlines()[:4]
    assert cells(head) == [*FIELDS, "peak"]
    for row, (name, one) in zip(rows, found.items(), strict=True):
        assert cells(row) == [name, *(amount(value) for value in (*vars(one).values(), one.peak))]
    assert page.rstrip().endswith("these fit: mlp, block")


def test_a_run_that_cannot_fit_is_refused_with_what_would_help(directory, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(forecasts, "free_memory_bytes", lambda device: 1234)
    assert finetune(directory, tmp_path / "out", batch_size=20) != 0
    assert not (tmp_path / "out").exists()
    error, (wanted, found) = capsys.readouterr().err, planned(directory, tmp_path / "out", batch_size=20)
    assert f"needs {amount(found['none'].peak)} of memory, and 1.2 kB are free" in error
    for flag, changed in {
        "--batch-size": replace(wanted, training=replace(wanted.training, batch_size=10)),
        "--gradient-checkpointing block": replace(
            wanted, training=replace(wanted.training, gradient_checkpointing="block")
        ),
        "--quantize nf4": replace(wanted, quantization=QuantizeConfig("nf4")),
        "--max-length": replace(wanted, rows=[(1, 1)] * len(wanted.rows)),
    }.items():
        assert flag in error
        assert forecast(changed).peak < found["none"].peak
    assert "--force" in error
    assert finetune(directory, tmp_path / "out", "--dry-run", batch_size=20) != 0
    assert capsys.readouterr().err.endswith(error)


@pytest.mark.parametrize(
    ("free", "flags", "runs"), [(1, ["--force"], True), (None, [], True), (-1, [], False), (0, [], True)]
)
def test_a_run_that_is_forced_or_fits_runs(directory, tmp_path, monkeypatch, free, flags, runs):
    needed = planned(directory, tmp_path / "out", max_steps=1)[1]["none"].peak
    free = needed + free if free in (0, -1) else free
    monkeypatch.setattr(forecasts, "free_memory_bytes", lambda device: free)
    assert (finetune(directory, tmp_path / "out", *flags, max_steps=1) == 0) == runs


def test_auto_is_told_and_recorded(directory, tmp_path, capsys, monkeypatch):
    needed = planned(directory, tmp_path / "out", max_steps=1)[1]["mlp"].peak
    monkeypatch.setattr(forecasts, "free_memory_bytes", lambda device: needed)
    for flags in (["--dry-run"], []):
        assert finetune(directory, tmp_path / "out", *flags, max_steps=1, gradient_checkpointing="auto") == 0
        assert ("(this run: mlp)\n" in capsys.readouterr().out) == bool(flags)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["config"]["gradient_checkpointing"], record["starts"][0]["gradient_checkpointing"]) == (
        "auto",
        "mlp",
    )


def test_a_config_json_is_enough_for_a_page(tmp_path, capsys):
    source = {key: value for key, value in tiny_config().source.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(source))
    assert cli.main(["inspect", str(tmp_path), "--memory"]) == 0
    settings, table = capsys.readouterr().out.split("\n\n")
    assert "4 rows of 1,024 tokens" in settings
    assert max(map(len, table.splitlines())) <= 120
    rows = map(cells, table.splitlines()[1:])
    for method, ways in pages.METHODS.items():
        found = forecasts.forecast(pages.default_plan(parse_config(source), method, CPU))
        for way in ways:
            name = method if way == "none" else f"{method}, {way}"
            assert next(rows) == [name, *(amount(value) for value in (*vars(found[way]).values(), found[way].peak))]
    assert not [*rows]


def test_amounts_are_told_in_powers_of_a_thousand():
    assert [amount(n) for n in (7, 1000, 2_500_000, 13_480_000_000)] == ["7 bytes", "1.0 kB", "2.5 MB", "13.5 GB"]


# --- the process ---


def test_only_the_command_changes_how_the_process_keeps_memory(directory, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(host, "_call_libc", lambda *call: calls.append(call))
    ml.train(tiny_model(), random_rows(0, 2), ml.TrainConfig(max_steps=1))
    assert not calls
    assert finetune(directory, tmp_path / "out", max_steps=1) == 0
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
    keeping, returning = [(trim, -1), (mmap, 2**25)], [(mmap, 2**25), (trim, 2**26)]
    assert calls == [*(("mallopt", *call) for call in keeping + returning), ("malloc_trim", 0)]


def test_what_the_import_took_is_no_part_of_the_peak(monkeypatch):
    monkeypatch.setattr(host, "AT_IMPORT", 0)
    whole = peak_memory_bytes(CPU)
    monkeypatch.setattr(host, "AT_IMPORT", 1000)
    assert peak_memory_bytes(CPU) - whole + 1000 in range(2**20)
    assert whole > 2**27 or sys.platform not in ("linux", "darwin")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A Linux machine with 900 kB to give, by its files."""

    def write(files):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)

    monkeypatch.setattr(host, "LINUX", tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    write({"proc/meminfo": "MemTotal:   2000 kB\nMemAvailable:    900 kB\n"})
    return write


def limited(group, limit, used, cached=0):
    """The files of a control group."""
    folder = f"sys/fs/cgroup/{group}"
    stat = f"anon 7\ninactive_file {cached}\n"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


CASES = {  # the groups of the process, their files, and what is free
    "no groups": (None, {}, 900 * 1024),
    "a limit": ("0::/a/b\n", limited("a/b", 5000, 3000, 400), 2400),
    "a limit of a group around": ("0::/a/b\n", limited("a/b", "max", 3000) | limited("a", 9000, 8000), 1000),
    "a container, whose group is the top": ("0::/docker/x\n", limited("", 100, 300), 0),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_what_is_free_is_the_least_that_machine_and_groups_allow(machine, case):
    groups, files, expected = CASES[case]
    machine(files if groups is None else {"proc/self/cgroup": groups, **files})
    assert free_memory_bytes(CPU) == expected


def test_of_a_mac_the_memory_is_told_and_of_the_unknown_nothing(machine, monkeypatch, tmp_path):
    (tmp_path / "proc/meminfo").unlink()
    assert free_memory_bytes(CPU) is None
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 3, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert free_memory_bytes(CPU) == 3 * 4096
