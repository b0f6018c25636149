"""What was measured: kept as lines of JSON, and shown as RESULTS.md."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import minilora
from benchmarks.process import Measurement, Round
from benchmarks.work import ALPHA, KEPT, OURS, RANK, STEPS, WARM_UP, Ablation, Training, Work

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # of a processor, that decide how fast bfloat16 is on it
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")


def surroundings(device: torch.device) -> dict[str, str]:
    """Machine and versions; figures are compared only where these are the same."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    named = re.search(r"^model name\s*: (.+)", text, flags=re.MULTILINE)
    words = set(text.split())
    processor = [named[1] if named else platform.processor() or platform.machine(), *(f for f in FLAGS if f in words)]
    machine = f"{' '.join(processor)}, {torch.get_num_threads()} of {os.cpu_count()} threads, {platform.system()}"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}; {machine}"
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    return {"machine": machine, "device": device.type, "versions": versions}


def code_hash() -> str:
    """A hash of the code that a run in Python can enter, by which figures name the state that they were measured at."""
    package, code = Path(minilora.__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).parts[0] not in ("cli", "testing", "tools"):
            code.update(path.read_bytes())
    return code.hexdigest()[:8]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def keep(path: Path, surroundings: dict[str, str], state: str, what: dict[str, Any]) -> None:
    """Add a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"date": date, **surroundings, "source": state, **what}) + "\n")


def kept(path: Path, surroundings: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """The lines of each work that were measured here, at the newest state of minilora's code that was."""
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    lines = [line for line in lines if all(line[key] == value for key, value in surroundings.items())]
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line["source"] == lines[-1]["source"]:
            found.setdefault(line["work"], []).append(line)
    return found


def as_round(line: dict[str, Any]) -> Round:
    """A line, as what it was made of."""
    sides = {side: Measurement(**measured) for side, measured in line["sides"].items()}
    return Round(**{key.name: line[key.name] for key in fields(Round)} | {"sides": sides})


def ratio(rounds: Sequence[Round], value: Callable[[Measurement], float], peer: str) -> list[float]:
    """Ours over the peer's in each round in which the peer had a turn."""
    return [value(each.sides[OURS]) / value(each.sides[peer]) for each in rounds if peer in each.sides]


def spread(values: Sequence[float]) -> str:
    """Median, and lowest to highest where there are several."""
    several = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.2f}{several}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def comparison(work: Training, rounds: Sequence[Round]) -> list[list[str]]:
    """A row for each peer of a work: rate and peak, ours, theirs, and ours over theirs."""
    found = []
    for peer in _peers(rounds):
        row = [work.name, peer]
        for value, amount in ((_rate, _tokens), (_peak, _gigabytes)):
            sides = [[value(each.sides[side]) for each in rounds if peer in each.sides] for side in (OURS, peer)]
            row += [*(amount(statistics.median(side)) for side in sides), spread(ratio(rounds, value, peer))]
        found.append(row)
    return found


def _peers(rounds: Sequence[Round]) -> list[str]:
    return list(dict.fromkeys(side for each in rounds for side in each.sides if side != OURS))


def utilisation(work: Training, rounds: Sequence[Round]) -> list[str]:
    """A row: FLOP a second over the peak of matrix products, and the peak of memory over what was told of it."""
    reached = [each.flop / sum(each.sides[OURS].seconds) for each in rounds]
    peaks = [each.gemm_peak for each in rounds]
    shares = [flops / peak for flops, peak in zip(reached, peaks, strict=True)]
    told = [each.sides[OURS].peak_bytes / each.forecast_bytes for each in rounds]
    gigaflops = [f"{statistics.median(values) / 1e9:,.0f}" for values in (reached, peaks)]
    return [work.name, *gigaflops, spread(shares), spread(told)]


def checks(work: Training, rounds: Sequence[Round]) -> Iterable[list[str]]:
    """A row for each number that has to be the same for everyone."""
    measured = {side: found for each in rounds for side, found in each.sides.items()}
    for name, bound in work.bounds.items():
        numbers = (f"{side} {found.checks[name]:.6g}" for side, found in measured.items() if name in found.checks)
        yield [work.name, name, ", ".join(numbers), f"{bound:g}"]


def without(ablations: Sequence[tuple[Ablation, Sequence[Round]]]) -> list[list[str]]:
    """A row for each trick: of each work time and peak memory without it, over those with everything on."""
    sides = dict.fromkeys(side for _, rounds in ablations for side in _peers(rounds))
    rows = [["(everything on)"]]
    for _, rounds in ablations:
        found = [each.sides[OURS] for each in rounds]
        seconds = statistics.median(statistics.mean(each.seconds) for each in found)
        rows[0] += [f"{seconds:.2f} s", f"{_gigabytes(statistics.median(each.peak_bytes for each in found))} GB"]
    for side in sorted(sides, key=lambda side: side == "everything plain"):
        row = [side]
        for _, rounds in ablations:
            time, memory = ratio(rounds, _rate, side), [1 / each for each in ratio(rounds, _peak, side)]
            row += [spread(time), spread(memory)] if time else ["", ""]
        rows.append(row)
    return rows


def _rate(measured: Measurement) -> float:
    return measured.rate


def _peak(measured: Measurement) -> float:
    return measured.peak_bytes


def _tokens(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}"


ABLATION = (
    "Seconds of a step and peak memory with one trick off, over those with everything on, in each round; below, "
    "everything off at once, but for *head rows*, which the definition has, too. Off, kernels leave the call to the "
    "plain function that they stand for; *kept memory*: the C library gives freed memory back to the system; *head "
    "rows*: the head sees all rows. Where a work makes no use of a trick there is no figure."
)
COMPARISON = (
    *("work", "peer", "tokens/s: minilora", "peer", "minilora over peer"),
    *("peak GB: minilora", "peer", "minilora over peer"),
)
MACHINE = ("work", "GFLOP/s reached", "peak of matrix products", "share", "peak memory over forecast")
CHECKS = ("work", "number", "of everyone", "may differ by this share")


def spoken(work: Work, rounds: Sequence[Round]) -> str:
    """What is known of a work so far: its rows of the tables."""
    if isinstance(work, Ablation):
        rows = without([(work, rounds)])
    else:
        rows = [utilisation(work, rounds), *comparison(work, rounds)]
    return "\n".join(" | ".join(row) for row in rows)


def page(lines: dict[str, list[dict[str, Any]]], works: Sequence[Work]) -> str:
    """RESULTS.md."""
    refused = [[name, found[-1]["refused"]] for name, found in lines.items() if "refused" in found[-1]]
    rounds = {name: [as_round(line) for line in found if "sides" in line] for name, found in lines.items()}
    shown = [(work, rounds[work.name]) for work in works if rounds.get(work.name) and work.name not in dict(refused)]
    training = [(each, measured) for each, measured in shown if isinstance(each, Training)]
    parts = [HEAD.format(**facts([line for found in lines.values() for line in found]))]
    parts.append("## Training\n\n" + table(COMPARISON, [row for each in training for row in comparison(*each)]))
    parts.append("## Beside the machine\n\n" + table(MACHINE, [utilisation(*each) for each in training]))
    parts.append("## The same work\n\n" + table(CHECKS, [row for each in training for row in checks(*each)]))
    ablations = [(each, measured) for each, measured in shown if isinstance(each, Ablation)]
    if ablations:
        head = ["without", *(f"{each.training}: {what}" for each, _ in ablations for what in ("time", "memory"))]
        parts.append("## Ablation\n\n" + ABLATION + "\n\n" + table(head, without(ablations)))
    if refused:
        parts.append("## Refused\n\n" + table(("work", "why"), refused))
    return "\n\n".join(parts) + "\n"


def facts(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Where, when and how all lines were measured."""
    dates = sorted(line["date"] for line in lines)
    kept_memory = " ".join(f"{name}={value}" for name, value in KEPT.items())
    numbers = {"warm_up": WARM_UP, "steps": STEPS, "rank": RANK, "alpha": ALPHA}
    return numbers | {
        "dates": f"{dates[0][:10]} to {dates[-1][:10]}" if dates[0][:10] != dates[-1][:10] else dates[0][:10],
        "machine": lines[0]["machine"],
        "versions": lines[0]["versions"],
        "code": lines[0]["source"],
        "kept": kept_memory,
    }


HEAD = """# What was measured

{dates}, {machine}; {versions}. Code {code}.

`python -m benchmarks --model smollm2` writes this page; `--help` tells how to measure a part of it.

Figures are medians of rounds, with the lowest and the highest round in brackets; without brackets there was one. In a
round everyone has a turn, each in a fresh process, another one first each time; a rate is all of a turn's tokens over
all its seconds, and a ratio is that of one round. Training is {warm_up} steps that do not count, then {steps}; tokens
are real ones, never pads. The peak of memory is the process's, less what it was after the imports; on CUDA torch's
allocator's. All begin with the same adapter (rank {rank}, alpha {alpha}, 7 linears a block, B not zero) and the same
batches of random tokens: *fixed*, 4 rows of 512, all learned; *real*, 8 rows of lognormal length (median 110, σ 0.6, 20
to 512), of each the second half learned; *long*, one document of 4,096. The model has 135 M parameters.

- **minilora**: `ml.load_model`, `ml.load_adapter`, `ml.train` with its defaults within `kept_memory`, as the command
  trains; `gradient_checkpointing="block"` where it says *recompute*.
- **peft**: transformers and PEFT in a plain loop: batches padded to their longest row, with a mask; base in the
  work's dtype, adapters in float32 as PEFT makes them; the model's own loss; SDPA; no cache; fused AdamW, clipped
  to norm 1; `gradient_checkpointing_enable(use_reentrant=False)` with recompute. QLoRA is bitsandbytes' NF4 with
  nested scales, as it is loaded, without `prepare_model_for_kbit_training`.
- **peft-kept**: the same loop while the C library keeps freed memory, as it does while the command trains (`{kept}`):
  what of the difference to peft that alone is.
- **peft-grouped**: the same loop with rows of like lengths in a batch, which pads less; the batches are others.
- **trl**: SFTTrainer as shipped: float32 weights, bfloat16 by autocast, gradient checkpointing, its own head and
  loss. **trl-best**: weights in bfloat16, no autocast, no checkpointing. Neither can leave out padding without
  FlashAttention.
- **lora**: minilora on a base that is not quantized.

FLOP are those of the frozen weights' forward pass and input gradients, of the adapter, of the head on learned
tokens, and of causal attention, whose probabilities are made twice; what else is computed again to save memory does
not count. The peak of matrix products is the best of three sizes in the same round."""
