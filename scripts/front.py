"""Write the tables and pictures of speed and memory, from what the benchmarks measured and a finished run.

    python scripts/front.py RUN

RUN is the directory that `minilora finetune` wrote. The table of all works goes between the marks `<!-- peers -->` of
docs/results.md, that of some to README.md, the pictures to docs/figures/ (extra `plot`).
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import results  # noqa: E402  # the checkout is no installed package
from benchmarks.process import Measurement, Round  # noqa: E402

LOG = ROOT / "benchmarks" / "RESULTS.jsonl"
WORKS = {
    "bf16-fixed": "bfloat16, 4 rows of 512",
    "bf16-fixed-recompute": "bfloat16, blocks recomputed",
    "bf16-real": "bfloat16, real lengths",
    "fp32-fixed": "float32, 4 rows of 512",
    "fp32-real": "float32, real lengths",
    "qlora-fixed-recompute": "QLoRA, blocks recomputed",
    "dora-fixed": "DoRA, bfloat16",
}
PEERS = {
    "peft": "",
    "peft-kept": "; PEFT with our memory setting",
    "peft-grouped": "; PEFT batches rows of like length",
}
IN_README = [
    *(("bf16-fixed", "peft"), ("bf16-fixed", "peft-kept")),
    *(("bf16-real", "peft"), ("bf16-real", "peft-grouped")),
    ("qlora-fixed-recompute", "peft"),
]
IN_RESULTS = [
    *((work, "peft") for work in WORKS),
    *(("bf16-fixed", "peft-kept"), ("bf16-real", "peft-kept"), ("bf16-real", "peft-grouped")),
]
INK = {"light": ("#1f2328", "#8c959f", "#0969da"), "dark": ("#e6edf3", "#7d8590", "#4493f8")}  # text, PEFT, minilora


def measured() -> tuple[str, dict[str, list[Round]]]:
    """Return the hash of the code that was measured last, and the rounds of each of the `WORKS` on that machine."""
    lines = [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()]
    last = next(line for line in reversed(lines) if line["work"] in WORKS and "sides" in line)
    kept = results.kept(LOG, {key: last[key] for key in ("machine", "device", "versions")})
    return last["source"], {work: [results.as_round(line) for line in kept[work] if "sides" in line] for work in WORKS}


def rate(side: Measurement) -> float:
    return side.rate


def peak(side: Measurement) -> float:
    return side.peak_bytes


def table(rounds: dict[str, list[Round]], shown: Collection[tuple[str, str]], head: str = "work") -> str:
    """Return the table in Markdown: for each of these works and peers, minilora's rate and peak memory over theirs."""
    rows = (
        [
            f"{WORKS[work]}{PEERS[peer]}",
            *(results.spread(results.ratio(rounds[work], of, peer)) for of in (rate, peak)),
        ]
        for work, peer in shown
    )
    return results.table((head, "tokens a second (PEFT = 1)", "peak memory (PEFT = 1)"), rows)


def table_of_results(code: str, rounds: dict[str, list[Round]]) -> str:
    """Return the table of docs/results.md, whose head has the hash of the code."""
    return table(rounds, IN_RESULTS, f"work, at source hash {code}")


def table_of_readme(code: str, rounds: dict[str, list[Round]], page: str) -> str:
    """Return the table of README.md, and a sentence on 7B parameters from a table of docs/results.md, the `page`.

    The hash of the code is in a comment, which readers do not see.
    """
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines()]
    ours = next(row for row in rows if "three steps of QLoRA" in row)
    theirs = next(row for row in rows if "PEFT with bitsandbytes" in row)
    costs = f"{ours[3]} s a step in {ours[5]}; PEFT: {theirs[3]} s in {theirs[5]}"
    run = f"One run of QLoRA at the size of 7B (random weights, 4 rows of 128): {costs}."
    return f"{table(rounds, IN_README)}\n\n{run} <!-- source hash {code} -->"


def between(text: str, mark: str, new: str) -> str:
    """Return a text with `new` between the marks."""
    return re.sub(
        f"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", lambda found: f"{found[1]}{new}\n{found[2]}", text, flags=re.DOTALL
    )


def draw(run: Path, rounds: dict[str, list[Round]], mode: str) -> None:
    """Draw the accuracy before and after the run, and speed and memory beside PEFT, in the colours of a mode."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    text, grey, blue = INK[mode]
    mpl.rcParams |= {"svg.hashsalt": "minilora", "font.size": 10, "text.color": text, "axes.labelcolor": text}
    mpl.rcParams |= {"xtick.color": text, "ytick.color": text}
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.9), width_ratios=(1.1, 2, 2), layout="constrained")
    accuracy = [summary[when]["accuracy"] for when in ("before", "after")]
    bars = axes[0].bar(["base", "adapter"], accuracy, color=[grey, blue], width=0.6)
    axes[0].bar_label(bars, [f"{each:.2f}" for each in accuracy], color=text)
    axes[0].set(title="built-in run: accuracy", ylim=(0, 1), yticks=[])
    names = list(WORKS.values())
    for axis, of, title in (
        (axes[1], rate, "tokens a second (PEFT = 1)"),
        (axes[2], peak, "peak memory (PEFT = 1)"),
    ):
        values = [statistics.median(results.ratio(rounds[work], of, "peft")) for work in WORKS]
        bars = axis.barh(names, values, color=blue, height=0.65)
        axis.bar_label(bars, [f" {value:.2f}" for value in values], color=text)
        axis.axvline(1, color=grey, linestyle="--", linewidth=1)
        axis.set(title=title, xlim=(0, max(1.1, 1.2 * max(values))), xticks=[0, 1], xticklabels=["0", "PEFT"])
        axis.invert_yaxis()
    axes[2].set_yticks([])
    for axis in axes:
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        axis.title.set_size(10)
    path = ROOT / "docs" / "figures" / f"overview-{mode}.svg"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args(arguments).run
    code, rounds = measured()
    results_page = ROOT / "docs" / "results.md"
    small = table_of_readme(code, rounds, results_page.read_text(encoding="utf-8"))
    for page, new in ((ROOT / "README.md", small), (results_page, table_of_results(code, rounds))):
        page.write_text(between(page.read_text(encoding="utf-8"), "peers", new), encoding="utf-8")
    for mode in INK:
        draw(run, rounds, mode)


if __name__ == "__main__":
    main()
