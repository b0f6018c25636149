"""Check the LoRA of other libraries with `minilora.testing`, and write peers_under_test.md beside this file.

    python -m benchmarks.peers_under_test --python A/bin/python --python B/bin/python

Each interpreter checks the peers that it can import, since some exclude each other. It needs what minilora needs, but
not minilora itself.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import peer_callables as layers
from benchmarks import peer_data as data
from benchmarks import peer_mlx as mlx
from benchmarks import peer_nf4 as nf4
from benchmarks import peer_training as training

PAGE = Path(__file__).with_suffix(".md")
KINDS = ("lora", "rslora", "dora", "merge", "merge_dora", "adapter_sum", "nf4", "double_quant", "linear4bit")
KINDS += ("loss_masking", "accumulation", "chat_mask", "adapter_directory")
MODULES = {  # distribution -> what must be importable
    "peft": "peft",
    "bitsandbytes": "bitsandbytes",
    "transformers": "transformers",
    "trl": "trl",
    "litgpt": "litgpt.lora",
    "loralib": "loralib",
    "lora-pytorch": "lora_pytorch",
    "torchtune": "torchtune.modules.peft",
    "torchao": "torchao",
    "adapters": "adapters.methods.lora",
    "mlx-lm": "mlx_lm.tuner.lora",
}


@dataclass(frozen=True)
class Entry:
    """What of a peer is checked: `kind` as in `minilora.testing.laws`."""

    peer: str
    kind: str
    implementation: Any
    what: str  # is called
    note: str = ""


PEERS = (
    Entry("peft", "lora", layers.peft_linear, "lora.Linear"),
    Entry("peft", "rslora", layers.peft_linear, "lora.Linear, use_rslora"),
    Entry("peft", "dora", layers.peft_linear, "lora.Linear, use_dora"),
    Entry("peft", "merge", layers.peft_merge, "merge"),
    Entry("peft", "merge_dora", layers.peft_merge, "merge, use_dora"),
    Entry("peft", "adapter_sum", layers.peft_sum("cat"), 'add_weighted_adapter, "cat"'),
    Entry("peft", "adapter_sum", layers.peft_sum("svd", svd_rank=layers.total_rank), 'add_weighted_adapter, "svd"'),
    Entry("peft", "adapter_sum", layers.peft_sum("linear"), 'add_weighted_adapter, "linear"'),
    Entry("peft", "adapter_directory", data.peft_directory, "save_pretrained"),
    Entry("peft", "adapter_directory", partial(data.peft_directory, use_dora=True), "save_pretrained, use_dora"),
    Entry(
        "peft",
        "adapter_directory",
        partial(data.peft_directory, use_rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 16}),
        "save_pretrained, use_rslora and patterns",
    ),
    Entry("bitsandbytes", "nf4", (nf4.bitsandbytes_quantize, nf4.bitsandbytes_dequantize), "quantize_4bit"),
    Entry(
        "bitsandbytes",
        "double_quant",
        (nf4.bitsandbytes_double_quantize, nf4.bitsandbytes_double_dequantize),
        "quantize_4bit, compress_statistics",
    ),
    Entry("bitsandbytes", "linear4bit", nf4.bitsandbytes_linear, "Linear4bit"),
    Entry("transformers", "loss_masking", training.transformers_loss, "ForCausalLMLoss"),
    Entry("transformers", "accumulation", training.transformers_accumulation, "Trainer.train"),
    Entry("transformers", "chat_mask", data.transformers_mask, "apply_chat_template, ChatML"),
    Entry("trl", "loss_masking", training.trl_loss, "SFTTrainer.compute_loss"),
    Entry("trl", "accumulation", training.trl_accumulation, "SFTTrainer.train"),
    *(
        Entry("trl", "chat_mask", data.trl_mask(family), f"assistant_only_loss, {family}")
        for family in ("llama3", "qwen2_5", "qwen3", "gemma", "phi3")
    ),
    Entry("litgpt", "lora", layers.litgpt_linear, "LoRALinear"),
    Entry("litgpt", "merge", layers.litgpt_merge, "LoRALinear.merge"),
    Entry("litgpt", "loss_masking", training.litgpt_loss, "chunked_cross_entropy"),
    Entry("litgpt", "accumulation", training.litgpt_accumulation, "finetune.lora.fit"),
    Entry("loralib", "lora", layers.loralib_linear, "Linear"),
    Entry("loralib", "lora", layers.loralib_unmerged, "Linear, merge_weights=False"),
    Entry("loralib", "merge", layers.loralib_merge, "Linear.eval"),
    Entry("lora-pytorch", "lora", layers.lora_pytorch_linear, "LoRA", "it says that alpha/r is in A's start values"),
    Entry("lora-pytorch", "merge", layers.lora_pytorch_merge, "merge_lora", "as its layer"),
    Entry("torchtune", "lora", layers.torchtune_linear, "LoRALinear"),
    Entry("torchtune", "dora", layers.torchtune_dora, "DoRALinear"),
    Entry("torchtune", "merge", layers.torchtune_merge, "get_merged_lora_ckpt"),
    Entry("torchtune", "merge_dora", layers.torchtune_merge, "get_merged_lora_ckpt with magnitude"),
    Entry("torchtune", "loss_masking", training.torchtune_loss, "lora_finetune_single_device._loss_step"),
    Entry("torchtune", "accumulation", training.torchtune_accumulation, "lora_finetune_single_device.train"),
    Entry("torchtune", "chat_mask", data.torchtune_mask, "OpenAIToMessages"),
    Entry("torchtune", "adapter_directory", data.torchtune_directory, "save_checkpoint"),
    Entry(
        "torchtune",
        "adapter_directory",
        partial(data.torchtune_directory, use_dora=True),
        "save_checkpoint, use_dora",
        'its adapter_config.json does not say `"use_dora": true`, so PEFT reads a LoRA and ignores the magnitudes',
    ),
    Entry(
        "torchao",
        "nf4",
        (nf4.torchao_quantize, nf4.torchao_dequantize),
        "NF4Tensor",
        "a format of its own: absmax is always quantized to int8, and the levels have four digits",
    ),
    Entry("torchao", "linear4bit", nf4.torchao_linear, "linear_nf4", "as its NF4Tensor"),
    Entry("adapters", "lora", layers.adapters_linear, "LoRALinear"),
    Entry("adapters", "dora", layers.adapters_linear, "LoRALinear, use_dora"),
    Entry("adapters", "merge", layers.adapters_merge, "merge_adapter"),
    Entry("adapters", "merge_dora", layers.adapters_merge, "merge_adapter, use_dora"),
    Entry("adapters", "adapter_sum", layers.adapters_sum("linear"), 'average_adapter, "linear"'),
    Entry("adapters", "adapter_sum", layers.adapters_sum("lora_delta_w_svd"), 'average_adapter, "lora_delta_w_svd"'),
    Entry("mlx-lm", "lora", mlx.mlx_linear, "LoRALinear"),
    Entry("mlx-lm", "dora", mlx.mlx_dora, "DoRALinear"),
    Entry("mlx-lm", "merge", mlx.mlx_merge, "LoRALinear.fuse"),
    Entry("mlx-lm", "merge_dora", mlx.mlx_merge, "DoRALinear.fuse"),
    Entry("mlx-lm", "loss_masking", mlx.mlx_loss, "default_loss"),
    Entry("mlx-lm", "accumulation", mlx.mlx_accumulation, "train"),
    Entry("mlx-lm", "chat_mask", mlx.mlx_mask, "ChatDataset, mask_prompt"),
)


@dataclass(frozen=True)
class Result:
    """What a law found of an entry: verdict "passes", "fails" or "does not apply"."""

    peer: str
    kind: str
    what: str
    law: str
    verdict: str
    ratio: float = 0.0
    message: str = ""
    causes: Sequence[str] = ()

    @property
    def cause(self) -> str:
        """The likely causes, or else the line of the message that says what was found."""
        lines = [line.strip() for line in self.message.splitlines()]
        return "; ".join(self.causes) or next((line for line in lines[3:4]), self.message)


def check_entry(entry: Entry) -> Iterable[Result]:
    """Try every law of an entry's kind."""
    from minilora.testing import CheckFailure, NotApplicable, laws

    with tempfile.TemporaryDirectory() as folder:
        is_directory = entry.kind == "adapter_directory"
        implementation = entry.implementation(folder) if is_directory else entry.implementation
        for name, law in laws(entry.kind).items():
            begin = (entry.peer, entry.kind, entry.what, name)
            try:
                yield Result(*begin, "passes", law.check(implementation).ratio)
            except NotApplicable as reason:
                yield Result(*begin, "does not apply", message=str(reason))
            except CheckFailure as failure:
                yield Result(*begin, "fails", message=str(failure).replace(folder, "FOLDER"), causes=failure.causes)


def state_of(peer: str) -> str:
    """Return the version, or why it cannot be imported, in parentheses."""
    try:
        importlib.import_module(MODULES[peer])
    except Exception as error:
        return f"({error})"
    return importlib.metadata.version(peer)


def check_here() -> dict[str, Any]:
    """Check every peer that this interpreter can import."""
    from minilora.testing.checks import LAWS

    kinds = {law.kind for law in LAWS}
    warnings.simplefilter("ignore")
    states = {peer: state_of(peer) for peer in MODULES}
    entries = [entry for entry in PEERS if states[entry.peer][0] != "(" and entry.kind in kinds]
    results = [asdict(result) for entry in entries for result in check_entry(entry)]
    return {"states": states, "results": results, "kinds": sorted(kinds), "python": _versions()}


def _versions() -> str:
    names = ("torch", "numpy", "transformers", "torchao", "mlx")
    found = [each.metadata["Name"] for each in importlib.metadata.distributions()]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names if name in found]
    return f"Python {platform.python_version()}, {', '.join(versions)}"


def check_in(interpreter: str) -> dict[str, Any]:
    """Run `check_here` in another interpreter."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        subprocess.run([interpreter, "-m", __spec__.name, "--json", file.name], check=True)
        return json.loads(Path(file.name).read_text("utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Check other libraries and write the page.")
    parser.add_argument("--python", action="append", default=[], help="an interpreter that has some of the peers")
    parser.add_argument("--json", help="check what this interpreter has, into a file")
    arguments = parser.parse_args()
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(check_here()), "utf-8")
    else:
        PAGE.write_text(page([check_in(each) for each in arguments.python or [sys.executable]]), "utf-8")


# --- the page ---

HEAD = """# Other libraries, checked with `minilora.testing`

{versions}; {machine}.

`python -m benchmarks.peers_under_test` writes this page. What is said of a library is said of the version in the table,
and of what a check found by calling its own code: `PEERS` in `benchmarks/peers_under_test.py` has every callable.

A cell has, of each thing that is checked, the laws that pass of those that apply, and the largest error of those that
pass over its derived bound: 1 is the limit. A cell is empty where a library has nothing of that kind."""
REPEAT = """Each message says how to repeat it; `implementation` is that of the same entry of `PEERS`."""


def page(runs: list[dict[str, Any]]) -> str:
    """Return the page of what several interpreters found; of a peer, the first that has it."""
    states, results = dict[str, str](), list[Result]()
    for peer in MODULES:
        having = [run for run in runs if run["states"][peer][0] != "("]
        states[peer] = (having or runs)[0]["states"][peer]
        found = having[0]["results"] if having else []
        results += [Result(**each) for each in found if each["peer"] == peer]
    versions = "; ".join(dict.fromkeys(run["python"] for run in runs))
    kinds = [kind for kind in KINDS if kind in runs[0]["kinds"]]
    parts = [HEAD.format(versions=versions, machine=f"{platform.system()} {platform.machine()}")]
    parts += ["## Summary", *_summary(states, results, kinds), "## What fails", *_failures(results)]
    return "\n\n".join(parts) + "\n"


def _summary(states: dict[str, str], results: list[Result], kinds: list[str]) -> list[str]:
    rows = [["peer", "version", *kinds]]
    for peer, state in states.items():
        if state[0] != "(":
            own = [[each for each in results if (each.peer, each.kind) == (peer, kind)] for kind in kinds]
            rows.append([peer, state, *map(_cell, own)])
    missing = [f"- {peer}: not installed {state}" for peer, state in states.items() if state[0] == "("]
    return [_table(rows), *(["\n".join(missing)] if missing else [])]


def _cell(results: list[Result]) -> str:
    cells = []
    for what in dict.fromkeys(each.what for each in results):
        own = [each for each in results if each.what == what and each.verdict != "does not apply"]
        ratios = [each.ratio for each in own if each.verdict == "passes"]
        count = f"{len(ratios)} of {len(own)}"
        count = count if len(ratios) == len(own) else f"**{count}**"
        cells.append(f"{what}: {count}" + (f" ({max(ratios):.2g})" if ratios else ""))
    return "<br>".join(cells)


def _failures(results: list[Result]) -> list[str]:
    """Return the table of what fails, a line for each cause, and then every message."""
    notes = {(entry.peer, entry.kind, entry.what): entry.note for entry in PEERS}
    failed = [each for each in results if each.verdict == "fails"]
    by_cause: dict[tuple[str, ...], list[str]] = {}
    for each in failed:
        note = notes[each.peer, each.kind, each.what]
        by_cause.setdefault((each.peer, each.what, each.cause, note), []).append(f"{each.kind}-{each.law}")
    rows = [["peer", "what", "laws", "likely cause, or what is found", "note"]]
    rows += [[peer, what, ", ".join(ids), cause, note] for (peer, what, cause, note), ids in by_cause.items()]
    parts = [_table(rows), "## Every failure", REPEAT]
    for each in failed:
        parts += [f"### {each.peer}, {each.what}: {each.kind}-{each.law}", f"```text\n{each.message}\n```"]
    return parts


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "| --- " * len(rows[0]) + "|", *lines[1:]])


if __name__ == "__main__":
    main()
