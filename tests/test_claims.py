"""The figures of the pages are those that experiments have stored, and that chapters print."""

import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OURS = {"claims.md": slice(2, 4), "which_settings.md": slice(1, 2), "results.md": slice(1, None)}  # columns of tables
CLEAN = (("built-in model", "built-in model"), ("10M", "10M model"))  # key of the files, name on the pages
STUDENT = {3: 4.303, 5: 2.776}  # t of the 95 % interval of as many values


def read(page):
    return (DOCS / page).read_text(encoding="utf-8")


def results(name, key="results"):
    path = ROOT / "tutorials" / "experiments" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))[key]


def mean(values, digits=3):
    return f"{statistics.mean(values):.{digits}f}"


def span(values, digits=3):
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def spread(values, digits=3):
    return f"{mean(values, digits)} ({span(values, digits)})"


def difference(ones, others, digits=3):
    more = [one - other for one, other in zip(ones, others, strict=True)]
    half = STUDENT[len(more)] * statistics.stdev(more) / len(more) ** 0.5
    return f"{abs(statistics.mean(more)):.{digits}f} ± {half:.{digits}f}"


def signed(values):
    return f"{min(values):+.2f} to {max(values):+.2f}"


def percent(values):
    return f"{100 * statistics.mean(values):.0f} %"


def rank():
    runs = results("05_rank")
    lora = {r: [run["accuracy"] for run in runs if run.get("r") == r] for r in (1, 2, 4, 8, 32)}
    full, sgd = ([run for run in runs if run["method"] == f"full, {name}"] for name in ("AdamW", "SGD"))
    whole, of_sgd = ([run["accuracy"] for run in each] for each in (full, sgd))
    yield f"accuracy {spread(lora[1])} at rank 1, {mean(lora[2])} at rank 2, {mean(lora[32])} at rank 32"
    base = results("05_rank", "base")
    yield f"full fine-tuning {mean(whole)}, base {base:.3f}"
    gain = (statistics.mean(lora[1]) - base) / (statistics.mean(whole) - base)
    yield f"rank 1 keeps {100 * gain:.0f} % of the gain"
    ranks = [mean([rank for run in each for rank in run["ranks"].values()], 0) for each in (full, sgd)]
    yield f"rank {ranks[0]} with AdamW (accuracy {mean(whole)}), {ranks[1]} with SGD ({mean(of_sgd)})"
    for r in (1, 4, 8, 32):
        yield f"rank {r}: {mean([run['cuts'][str(r)] for run in full])}, {mean(lora[r])}"


def rates():
    lowest = {}
    for _, r, scale, _, seed, loss in results("04_rates"):
        key = r, round(scale, 2), seed
        lowest[key] = min(loss, lowest.get(key, loss))
    best = {each: mean([lowest[*each, seed] for seed in (0, 1, 2)]) for each in ((8, 2.0), (64, 0.25), (64, 0.71))}
    yield f"{best[8, 2.0]}, {best[64, 0.25]} under α/r; {best[8, 2.0]}, {best[64, 0.71]} under α/√r"


def where():
    runs = results("06_where")
    best = {}
    for place in {run["place"] for run in runs}:
        of_rate = {}
        for run in runs:
            if run["place"] == place:
                of_rate.setdefault(run["rate"], []).append(run)
        best[place] = max(of_rate.values(), key=len)  # the other seeds try the best rate of the first
    attention, mlps, everywhere = (best[place] for place in ("attention", "MLPs", "all"))

    def values(key, of):
        return [run[key] for run in sorted(of, key=lambda run: run["seed"])]

    def compare(key, one, two, digits=3):
        return difference(values(key, one), values(key, two), digits)

    loss, accuracy = ([mean(values(key, each)) for each in (attention, mlps)] for key in ("loss", "accuracy"))
    yield f"loss {loss[0]} against {loss[1]}, a difference of {compare('loss', attention, mlps)}"
    yield f"accuracy {accuracy[0]} against {accuracy[1]}"
    yield f"loss lower by {compare('loss', everywhere, mlps)}"
    kls = [spread(values("kl", each), 2) for each in (attention, mlps)]
    yield f"{kls[0]} against {kls[1]}, a difference of {compare('kl', attention, mlps, 2)}"
    yield f"all linears have the most, {spread(values('kl', everywhere), 2)}"
    means = [mean(values("kl", each), 2) for each in (mlps, everywhere, attention)]
    yield f"the MLPs alone, which had KL {means[0]} where the attention had {means[2]} and all linears {means[1]}"
    yield f"general text: loss {runs[0]['general_before']} -> "


def memory():
    peak = {run["way"]: f"{run['measured'] / 1e9:.2f}" for run in results("07_memory")}
    ways = list(peak)
    yield f"full {peak['full']} GB, LoRA {peak['LoRA']}, QLoRA {peak['QLoRA']}, with recomputation {peak[ways[3]]}"


def codes():
    found = {(run["code"], run["block_size"]): run for run in results("08_codes")}
    kl = {name: f"{run['kl']:.3f} ± {run['kl_interval']:.3f}" for (name, size), run in found.items() if size == 64}
    yield f"SmolLM2: {kl['NF4']}, {kl['FP4, E2M1']}, {kl['Int4']}"
    yield f"SmolLM2: {kl['FP4, bitsandbytes']} against {kl['Int4']}"
    more = {key: f"{run['more']:.3f} ± {run['more_interval']:.3f}" for key, run in found.items()}
    yield f"{more['fitted, |e|', 4096]}, {more['fitted, e²', 4096]} (SmolLM2)"
    for key, model in CLEAN:
        clean = {(run["code"], run["block_size"]): run for run in results("08_codes", key)}
        kl = {name: f"{run['kl']:.4f}" for (name, size), run in clean.items() if size == 64}
        more = {key: f"{run['more']:.4f} ± {run['more_interval']:.4f}" for key, run in clean.items()}
        yield f"the {model}: NF4 {kl['NF4']}, FP4 (E2M1) more by {more['FP4, E2M1', 64]}, Int4 by {more['Int4', 64]}"
        yield f"the {model}: {kl['FP4, bitsandbytes']} against {kl['Int4']}"
        yield f"{more['fitted, |e|', 64]} and {more['fitted, e²', 64]} ({model})"
        yield f"{more['fitted, |e|', 4096]}, {more['fitted, e²', 4096]} ({model})"


def methods():
    runs = results("11_methods")

    def values(method, rate, key):
        return [run[key] for run in runs if run["method"] == method and rate in (None, run["rate"])]

    for method in ("full", "LoRA", "DoRA"):
        yield signed([each["q_proj"] for each in values(method, None, "all checkpoints")])
    tests = {m: mean(values(m, rate, "test")) for m, rate in (("LoRA", 2e-3), ("DoRA", 2e-3), ("PiSSA", 5e-4))}
    yield f"LoRA {tests['LoRA']}, DoRA {tests['DoRA']}, PiSSA {tests['PiSSA']}"
    yield f"or {mean(values('PiSSA', 1e-3, 'test'))} at another rate"
    yield f"accuracy {tests['LoRA']} against {mean(values('full', 4e-4, 'test'))}"
    lora, full = ([values(*each, key) for key in ("kl", "test")] for each in (("LoRA", 2e-3), ("full", 4e-4)))
    yield f"KL {spread(lora[0], 2)} against {mean(full[0], 2)}, a difference of {difference(lora[0], full[0], 2)}"
    slow = [values("full", 2e-4, key) for key in ("kl", "test")]
    yield f"accuracy is {mean(slow[1])} has a KL of {mean(slow[0], 2)}; LoRA at {tests['LoRA']} has {mean(lora[0], 2)}"
    yield f"a difference of {difference(lora[0], slow[0], 2)} over three seeds"
    assert min(full[1]) > max(values("LoRA", None, "test"))
    lowest = [mean(values("LoRA", 1e-3, key), digits) for key, digits in (("kl", 2), ("test", 3))]
    yield f"At its lowest rate LoRA has a KL of {lowest[0]}, with an accuracy of {lowest[1]}"


def paired():
    more = {(pair["method"], pair["rate"]): pair for pair in results("11_paired")}

    def over_seeds(method, rate, key):
        return difference(more[method, rate][key]["seeds"], [0, 0, 0])

    def over_rows(method, rate):
        return f"± {more[method, rate]['accuracy']['interval']:.3f} over the rows"

    yield f"The accuracies differ by {over_seeds('full', 2e-4, 'accuracy')}."
    yield f"loss higher by {over_seeds('full', 4e-4, 'loss')} over three seeds"
    yield f"a difference of {over_seeds('full', 4e-4, 'accuracy')} over the seeds and {over_rows('full', 4e-4)}"
    dora, pissa, faster = (over_seeds(*each, "accuracy") for each in (("DoRA", 2e-3), ("PiSSA", 5e-4), ("PiSSA", 1e-3)))
    yield f"a difference of {dora} over three seeds, {over_rows('DoRA', 2e-3)}"
    yield f"DoRA {dora}, PiSSA {pissa} or {faster}, over three seeds"
    losses = [over_seeds("PiSSA", rate, "loss") for rate in (5e-4, 1e-3)]
    yield f"loss of PiSSA {losses[0]} or {losses[1]} higher"


def merging():
    runs = results("10_merging")

    def pair(values):
        return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"

    loss = {
        target: pair([run[target]["loss"] for run in runs]) for target in ("original", "dequantized", "requantized")
    }
    base = [mean([run[key] for run in runs]) for key in ("base, 16 bits", "base, 4 bits")]
    yield f"base {base[0]}, rounded to NF4 {base[1]}, trained {pair([run['trained'] for run in runs])}"
    yield f"loss {loss['requantized']}; {percent([run['requantized']['unchanged'] for run in runs])} of the weights"
    yield f"SmolLM2: {loss['original']} merged into the original, {loss['dequantized']} into the dequantized"
    yield f"{mean([run['original']['error'] for run in runs], 0)} times over all layers after 16 steps"
    unchanged = [percent([run["early"][i]["unchanged"] for run in runs]) for i in (0, -1)]
    yield f"SmolLM2 {unchanged[0]} and {unchanged[1]} (merged"
    bases = statistics.mean([run["base, 16 bits"] - run["base, 4 bits"] for run in runs])
    more = statistics.mean([run["original"]["loss"] - run["dequantized"]["loss"] for run in runs])
    yield f"| {bases:+.3f} | {more:+.3f} |"


def clean_merging():
    for key, model in CLEAN:
        for rate, runs in results("10_merging", key).items():
            ratio = statistics.mean([run["original"]["error"] for run in runs])
            bases = statistics.mean([run["base, 16 bits"] - run["base, 4 bits"] for run in runs])
            more = [run["original"]["more"] for run in runs]
            yield f"| {model}, {rate} | {ratio:.1f} | {bases:+.3f} | {statistics.mean(more):+.3f} |"
            yield f"{model} {spread(more)}"
            losses = [mean(run[target]["loss"] for run in runs) for target in ("dequantized", "requantized")]
            base = mean([run["base, 4 bits"] for run in runs])
            yield f"{model}, {rate}: {losses[0]} merged in bfloat16, {losses[1]} in NF4, base {base}"
            unchanged = [percent([run["early"][i]["unchanged"] for run in runs]) for i in (0, -1)]
            yield f"{unchanged[0]} and {unchanged[1]} ({model}, {rate})"


def specialists():
    for key, model in (("results", "built-in model"), ("10M", "10M model")):
        runs = results("10_specialists", key)

        def loss(way, part=0, runs=runs):
            return mean([run[way][part] for run in runs])

        mean_of_two, ties = ([loss(way, part) for part in (0, 1)] for way in ("mean", "TIES"))
        yield f"{model}: mean of the two {mean_of_two[0]} and {mean_of_two[1]}, TIES {ties[0]} and {ties[1]}"
        dropped = [f"{loss(way)} before, {loss(f'{way}, dropped')} after" for way in ("first", "whole")]
        yield f"{model}: a specialist {dropped[0]}; the adapter of all categories {dropped[1]}"
    sums = [[sum(run[f"{way}, tuned"]) for run in results("10_specialists")] for way in ("mean", "TIES")]
    of_mean, of_ties = (", ".join(f"{loss:.3f}" for loss in each) for each in sums)
    yield f"{of_mean} for the mean and {of_ties} for TIES, a difference of {difference(*sums)}"


def forgetting():
    runs = {}
    for run in results("09_forgetting"):
        runs.setdefault(run["run"], []).append(run)

    def at(name, kind, factor, which):
        return statistics.mean(run[kind][factor][which] for run in runs[name] if run[kind])

    listed = {name: ", ".join(str(run["intruders"]) for run in each) for name, each in runs.items()}
    kls = {name: f"KL {at(name, 'scaled', '1.0', 1):.2f}" for name in runs}
    full, higher, highest, best, fast, small = runs
    assert listed[full] == "0, 0, 0"
    yield f"0 at twice its best rate ({kls[full]}), {listed[higher]} at four times ({kls[higher]})"
    yield f"{listed[highest]} at eight times ({kls[highest]})"
    yield f"LoRA: {listed[best]} at its best rate, {listed[fast]} at four times that rate ({kls[fast]})"
    yield f"at rank 1 with the high rate {listed[small]} ({kls[small]})"
    name = "LoRA r 16, 8e-3"
    kl, accuracy = ([at(name, "scaled", "1.0", i), at(name, "shrunk", "0.75", i)] for i in (1, 0))
    yield f"the KL from {kl[0]:.2f} to {kl[1]:.2f} and the accuracy from {accuracy[0]:.3f} to {accuracy[1]:.3f}"
    yield f"KL {at(name, 'scaled', '0.75', 1):.2f} and accuracy {at(name, 'scaled', '0.75', 0):.3f}"
    name = "LoRA r 16, 2e-3"
    kl, accuracy = ([at(name, "scaled", factor, i) for factor in ("1.0", "0.5", "0.75")] for i in (1, 0))
    yield f"from {kl[0]:.2f} to {kl[1]:.2f} and the accuracy from {accuracy[0]:.3f} to {accuracy[1]:.3f}"
    yield f"at 0.75 of the scale they are {kl[2]:.2f} and {accuracy[2]:.3f}"


def replay():
    runs = {}
    for run in results("09_replay"):
        runs.setdefault((run["replay"], run["factor"]), []).append(run)
    plain, replayed = runs[0, 1.0], runs[1, 1.0]
    after, kl, loss = ([[run[key] for run in each] for each in (replayed, plain)] for key in ("after", "kl", "loss"))
    base = mean([run["before"] for run in plain], 2)
    yield f"general text: {mean(after[0], 2)} with replay, {mean(after[1], 2)} without, {base} in the base"
    yield f"KL: {mean(kl[0], 2)} with, {mean(kl[1], 2)} without, a difference of {difference(*kl, 2)}"
    yield f"Loss on the task: {mean(loss[0])} with, {mean(loss[1])} without, a difference of {difference(*loss, 2)}"


def inside():
    found = results("12_inside")

    def pairs(one, two, start, order, key, kind="all"):
        """φ of the pairs of runs of two methods that share, or do not share, the start and the order."""
        chosen = []
        for each in found:
            first, second = each.get("pair", [[None] * 3] * 2)
            same = first[1] == second[1], first[2] == second[2]
            if each.get("kind") == kind and {first[0], second[0]} == {one, two} and same == (start, order):
                chosen.append(each[key])
        return chosen

    across = [pairs("LoRA 8", "LoRA 64", False, False, key) for key in ("out 1,1", "in 1,1", "A 1,1")]
    assert len(across[0]) == 9
    assert spread(across[1], 2) == spread(across[2], 2)
    yield f"outputs of ΔW {spread(across[0], 2)}, inputs and rows of A {spread(across[1], 2)}"
    seeds = [
        mean(pairs("LoRA 64", "LoRA 64", False, False, f"{side} 8,8", kind), 2)
        for side in ("A", "out")
        for kind in ("q_proj", "v_proj")
    ]
    yield f"φ(8, 8) of A {seeds[0]} and {seeds[1]}, of the outputs {seeds[2]} and {seeds[3]}"
    runs = [
        [each for each in found if each["kind"] == "all" and each.get("run", [""])[0] == method]
        for method in ("LoRA 8", "LoRA 64")
    ]
    norms = [mean([run[f"{key} 4"] for run in runs[0]], 2) for key in ("inside", "own", "chance")]
    yield f"rank 8: {', '.join(norms)}"
    factors = [mean([run["size 4"] / run["inside 4"] for run in each], 1) for each in runs]
    yield f"{factors[0]} at rank 8, {factors[1]} at rank 64"
    start = mean(pairs("LoRA 8", "LoRA 8", True, False, "in 8,8"), 2)
    other = mean(pairs("LoRA 8", "LoRA 8", False, False, "in 8,8"), 2)
    yield f"{start} with the same start and another order of rows, {other} with another start"
    yield f"full fine-tuning {mean(pairs('full', 'full', False, False, 'in 8,8'), 2)}"


def reinforcement():
    rewards = {}
    for run in results("A2_reinforcement"):
        if run["chosen"]:
            rewards.setdefault(run["way"], []).append(run["rewards"])
    first = {reward[0] for runs in rewards.values() for reward in runs}
    assert len(first) == 1
    last = [[reward[-1] for reward in runs] for runs in rewards.values()]
    one, eight, full = map(spread, last)
    yield f"from {first.pop():.3f} to {one} at rank 1, {eight} at rank 8, {full} in full"
    yield f"rank 8 has {difference(last[1], last[2])} more and rank 1 has {difference(last[0], last[2])} less"


STORED = (rank, rates, where, memory, codes, methods, paired, merging, clean_merging, specialists)
STORED += (forgetting, replay, inside, reinforcement)


@pytest.mark.parametrize("figures", STORED)
def test_what_the_pages_repeat_is_what_the_experiment_has_stored(figures):
    pages = " ".join(" ".join(map(read, [*OURS, "../README.md", "../tutorials/10_merging.md"])).split())
    missing = [figure for figure in figures() if figure not in pages]
    assert not missing


def test_the_readme_shows_the_first_run_of_the_results():
    shown = re.findall(r"^(?:base|adapter) +([\d.]+) +([\d.]+)$", read("../README.md"), re.MULTILINE)
    (loss, accuracy), (lower, higher) = (map(float, row) for row in shown)
    assert f"| 0 | {accuracy:.3f} | {higher:.3f} | {loss:.3f} | {lower:.3f} |" in read("results.md")


def numbers(text):
    text = re.sub(r"`.*?`|\]\(.*?\)|\[chapter \d+\]", "", text)  # neither flags nor links
    return set(re.findall(r"(?<![\w.,])\d+(?:[.,]\d+)*(?!\w)", text))


def linked(text):
    return [DOCS / path for path in re.findall(r"\]\(([\w./-]+\.md)", text)]


@pytest.mark.parametrize("page", OURS)
def test_every_other_figure_of_a_table_stands_in_the_pages_that_its_row_or_its_section_links(page):
    text = read(page)
    for stored in STORED:
        for figure in stored():
            text = text.replace(figure, "")
    missing = {}
    for heading, *lines in map(str.splitlines, text.split("\n## ")[1:]):
        section = "\n".join(lines)
        for row in re.findall(r"^\| (.+) \|$", section, re.MULTILINE):
            if sources := linked(heading + row) or linked(section):
                known = numbers(" ".join(path.read_text(encoding="utf-8") for path in sources))
                found = numbers(" ".join(row.split(" | ")[OURS[page]]))
                missing |= {row: found - known} if found - known else {}
    assert not missing
