"""The figures of the pages are those that experiments have stored, and that chapters print."""

import hashlib
import json
import re
import runpy
import statistics
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXPERIMENTS = ROOT / "tutorials" / "experiments"
OURS = {"settings.md": slice(1, 2), "results.md": slice(1, None)}  # columns of tables
CLAIMS = "paper_claims.md"
CLEAN = (("built-in model", "built-in model"), ("10M", "10M model"))  # key of the files, name on the pages
PAIRED = runpy.run_path(str(EXPERIMENTS / "record.py"))["paired_interval"]
STUDENT = {3: 4.303, 5: 2.776}  # t of the 95 % interval of as many values


def read(page):
    return (DOCS / page).read_text(encoding="utf-8")


def results(name, key="results"):
    return json.loads((EXPERIMENTS / f"{name}.json").read_text(encoding="utf-8"))[key]


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


def percent(values):
    return f"{100 * statistics.mean(values):.0f} %"


def rank():
    runs, base = results("06_rank"), results("06_rank", "base")
    rank_1, rank_32 = ([run["accuracy"] for run in runs if run.get("r") == r] for r in (1, 32))
    tuned = [run for run in runs if run["method"] == "full, AdamW"]
    full = statistics.mean(run["accuracy"] for run in tuned)
    behind = [100 * (more - less) for less, more in zip(rank_1, rank_32, strict=True)]
    yield f"rank 1 keeps {100 * (statistics.mean(rank_1) - base) / (full - base):.0f} % of the gain"
    yield f"below rank 32 with each seed, by {span(behind, 1)} points"
    needed = statistics.mean(rank for run in tuned for rank in run["ranks"].values())
    yield f"Rank {needed:.0f} is {needed / 16:.1f} times our usual rank of 16"


def where():
    runs = results("07_where")
    best = {}
    for place in {run["place"] for run in runs}:
        of_rate = {}
        for run in runs:
            if run["place"] == place:
                of_rate.setdefault(run["rate"], []).append(run)
        best[place] = max(of_rate.values(), key=len)  # the other seeds try the best rate of the first
    names = [f"{letter}_proj" for letter in "qkvo"] + [f"{word}_proj" for word in ("gate", "up", "down")]
    yield "loss " + ", ".join(f"{mean(run['loss'] for run in best[name])} at `{name}`" for name in names)
    attention, mlps, everywhere = (
        [run["kl"] for run in sorted(best[place], key=lambda run: run["seed"])]
        for place in ("attention", "MLPs", "all")
    )
    yield f"{spread(attention, 2)} against {spread(mlps, 2)}, a difference of {difference(attention, mlps, 2)}"
    yield f"all linears have the most, {spread(everywhere, 2)}"
    yield f"only the MLPs (in one experiment a KL of {mean(mlps, 2)}, with all linear layers {mean(everywhere, 2)})"


def codes():
    for runs in zip(*(results("09_codes", key) for key in ("built-in model", "10M", "results")), strict=True):
        cells = [f"{run['squared']:.4f}, {run['kl']:.4f}" for run in runs]
        if runs[0]["code"] != "NF4":
            cells = [
                f"{cell}, {run['more']:+.4f} ± {run['more_interval']:.4f}"
                for cell, run in zip(cells, runs, strict=True)
            ]
        code = runs[0]["code"].replace("|", r"\|")
        yield f"| {code}, {runs[0]['block_size']:,} | {' | '.join(cells)} |"
    found = {(run["code"], run["block_size"]): run for run in results("09_codes")}
    kl = {name: f"{run['kl']:.3f} ± {run['kl_interval']:.3f}" for (name, size), run in found.items() if size == 64}
    yield f"SmolLM2: {kl['NF4']}, {kl['FP4, E2M1']}, {kl['Int4']}"
    yield f"SmolLM2: {kl['FP4, bitsandbytes']} against {kl['Int4']}"
    more = {key: f"{run['more']:.3f} ± {run['more_interval']:.3f}" for key, run in found.items()}
    yield f"{more['fitted, |e|', 4096]}, {more['fitted, e²', 4096]} (SmolLM2)"
    for key, model in CLEAN:
        clean = {(run["code"], run["block_size"]): run for run in results("09_codes", key)}
        kl = {name: f"{run['kl']:.4f}" for (name, size), run in clean.items() if size == 64}
        more = {key: f"{run['more']:.4f} ± {run['more_interval']:.4f}" for key, run in clean.items()}
        if model == "built-in model":
            error = {key: f"{run['absolute']:.4f}" for key, run in clean.items()}
            of = f"error of the {model}'s weights, block"
            yield f"{of} 64: {error['FP4, bitsandbytes', 64]} against {error['Int4', 64]}"
            yield f"{of} 4,096: {error['fitted, |e|', 4096]} against {error['NF4', 4096]}"
        yield f"the {model}: NF4 {kl['NF4']}, FP4 (E2M1) more by {more['FP4, E2M1', 64]}, Int4 by {more['Int4', 64]}"
        yield f"the {model}: {kl['FP4, bitsandbytes']} against {kl['Int4']}"
        yield f"{more['fitted, |e|', 64]} and {more['fitted, e²', 64]} ({model})"
        yield f"{more['fitted, |e|', 4096]}, {more['fitted, e²', 4096]} ({model})"


def intruders():
    def found(name, way, factor):
        runs = [run for run in results("10_forgetting") if run["run"] == name and run["shrunk"]]
        return [statistics.mean(run[way][factor][i] for run in runs) for i in (0, 1)]

    for name in ("LoRA r 16, 8e-3", "LoRA r 1, 8e-3"):
        whole, shrunk, scaled = (
            found(name, *each) for each in (("scaled", "1.0"), ("shrunk", "0.75"), ("scaled", "0.75"))
        )
        yield (
            f"change the KL from {whole[1]:.2f} to {shrunk[1]:.2f} and the accuracy from {whole[0]:.3f} to "
            f"{shrunk[0]:.3f}; the whole adapter times 0.75 has KL {scaled[1]:.2f} and accuracy {scaled[0]:.3f}"
        )
    best = [found("LoRA r 16, 2e-3", *each)[1] for each in (("scaled", "1.0"), ("shrunk", "0.75"))]
    yield f"At the best rate, intruders times 0.75: KL less by {100 * (1 - best[1] / best[0]):.0f} %"
    lost = [
        100 * (found(name, "scaled", "1.0")[0] - found(name, "shrunk", "0.0")[0])
        for name in ("LoRA r 16, 8e-3", "LoRA r 1, 8e-3")
    ]
    kl = [found("LoRA r 1, 8e-3", "shrunk", factor)[1] for factor in ("0.0", "0.5")]
    yield (
        f"they cost {lost[0]:.0f} points of accuracy at rank 16 and {lost[1]:.0f} at rank 1, where the KL is then "
        f"{kl[0]:.2f}, more than the {kl[1]:.2f} with"
    )


def methods():
    runs = results("12_methods")

    def values(method, rate, key):
        return [run[key] for run in runs if run["method"] == method and rate in (None, run["rate"])]

    tests = {m: mean(values(m, rate, "test")) for m, rate in (("LoRA", 2e-3), ("DoRA", 2e-3), ("PiSSA", 5e-4))}
    yield f"LoRA {tests['LoRA']}, DoRA {tests['DoRA']}, PiSSA {tests['PiSSA']}"
    lora, full = ([values(*each, key) for key in ("kl", "test")] for each in (("LoRA", 2e-3), ("full", 4e-4)))
    yield f"KL {spread(lora[0], 2)} against {mean(full[0], 2)}, a difference of {difference(lora[0], full[0], 2)}"
    slow = [values("full", 2e-4, key) for key in ("kl", "test")]
    yield f"accuracy is {mean(slow[1])} has a KL of {mean(slow[0], 2)}; LoRA at {tests['LoRA']} has {mean(lora[0], 2)}"
    yield f"a difference of {difference(lora[0], slow[0], 2)} over three seeds"
    answers = [round(400 * sum(values("full", rate, "valid"))) for rate in (2e-4, 4e-4)]
    runs_of_rows = {(run["method"], run["rate"]): run for run in results("12_paired")}
    more = paired(runs_of_rows["full", 2e-4], runs_of_rows["LoRA", 2e-3])
    yield f"{answers[1] - answers[0]} answers of 1,200 behind 4e-4; with it full - LoRA in the loss is {more}"
    assert min(full[1]) > max(values("LoRA", None, "test"))
    lowest = [mean(values("LoRA", 1e-3, key), digits) for key, digits in (("kl", 2), ("test", 3))]
    yield f"At its lowest rate LoRA has a KL of {lowest[0]}, with an accuracy of {lowest[1]}"


def merging():
    runs = results("11_merging")

    def pair(values):
        return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"

    loss = {
        target: pair([run[target]["loss"] for run in runs]) for target in ("original", "dequantized", "requantized")
    }
    base = [mean([run[key] for run in runs]) for key in ("base, 16 bits", "base, 4 bits")]
    yield f"base {base[0]}, rounded to NF4 {base[1]}, trained {pair([run['trained'] for run in runs])}"
    yield f"loss {loss['requantized']}; {percent([run['requantized']['unchanged'] for run in runs])} of the weights"
    yield f"SmolLM2: {loss['original']} merged into the original, {loss['dequantized']} into the dequantized"
    unchanged = [percent([run["early"][i]["unchanged"] for run in runs]) for i in (0, -1)]
    yield f"SmolLM2 {unchanged[0]} and {unchanged[1]} (merged"
    bases = statistics.mean([run["base, 16 bits"] - run["base, 4 bits"] for run in runs])
    more = statistics.mean([run["original"]["loss"] - run["dequantized"]["loss"] for run in runs])
    yield f"| {bases:+.3f} | {more:+.3f} |"


def clean_merging():
    for key, model in CLEAN:
        for rate, runs in results("11_merging", key).items():
            ratio = statistics.mean([run["original"]["error"] for run in runs])
            bases = statistics.mean([run["base, 16 bits"] - run["base, 4 bits"] for run in runs])
            more = [run["original"]["more"] for run in runs]
            yield f"| {model}, {rate} | {ratio:.1f} | {bases:+.3f} | {statistics.mean(more):+.3f} |"
            yield f"{model} {spread(more)}"


def specialists():
    for key, model in (("results", "built-in model"), ("10M", "10M model")):
        runs = results("11_specialists", key)

        def loss(way, runs=runs):
            return mean([run[way][0] for run in runs])

        dropped = [f"{loss(way)} before, {loss(f'{way}, dropped')} after" for way in ("first", "whole")]
        yield f"{model}: a specialist {dropped[0]}; the adapter of all categories {dropped[1]}"
    sums = [[sum(run[f"{way}, tuned"]) for run in results("11_specialists")] for way in ("mean", "TIES")]
    of_mean, of_ties = (", ".join(f"{loss:.3f}" for loss in each) for each in sums)
    yield f"{of_mean} for the mean and {of_ties} for TIES, a difference of {difference(*sums)}"


def paired(one, other, key="loss"):
    """The difference of two stored runs over the same seeds and rows, with its interval by the rule."""
    values = ([[1e-4 * value for value in seed[key]] for seed in run["outcomes"]] for run in (one, other))
    more, half = PAIRED(*values)
    return f"{more:+.3f} ± {half:.3f}"


def planned_mean(run, key, unit=1e-4):
    return f"{unit * statistics.mean(statistics.mean(seed[key]) for seed in run['outcomes']):.3f}"


SIZES = ("sizes", "sizes_10m", "sizes_smollm2", "sizes_gemma3")


def sizes():
    for run in chain.from_iterable(map(results, SIZES)):
        loss, exact, kl = (planned_mean(run, key, unit) for key, unit in (("loss", 1e-4), ("exact", 1), ("kl", 1e-4)))
        tried = ", ".join(
            f"{rate:g}: {valid:.3f}" for rate, valid in sorted((float(r), v) for r, v in run["valid"].items())
        )
        yield f"| {run['rows']:,} | {run['method']} | {tried} | {run['rate']} | {loss} | {exact} | {kl} |"
    ratios = {}
    for name in SIZES:
        rates = {(run["rows"], run["method"]): run["rate"] for run in results(name)}
        by_rows = {rows: rates[rows, "LoRA"] / rates[rows, "full"] for rows, method in rates if method == "full"}
        ratios[name] = [f"{ratio:g}" for _, ratio in sorted(by_rows.items())]
    built_in, clean, small, large = ratios.values()
    assert built_in == 3 * built_in[:1]
    assert clean[0] == clean[1]
    yield f"{built_in[0]} times in the built-in model at each of three sizes"
    yield f"{clean[0]} times in the 10M model at 200 and 1,000 rows and {clean[2]} times at 5,000"
    yield f"{small[0]} times in SmolLM2, {large[0]} times in Gemma 3"
    flat = sorted(map(float, chain.from_iterable(ratios.values())))
    yield f"between {flat[0]:g} and {flat[-1]:g} times"


def equal():
    runs = {(run["method"], run["rows"]): run for run in results("10_equal")}
    lora = [planned_mean(run, "kl") for run in results("sizes") if run["method"] == "LoRA"]
    half = [[planned_mean(runs["full, half rate", rows], key) for rows in (200, 1000, 5000)] for key in ("kl", "loss")]
    kl, loss, of_lora = ("{}, {} and {}".format(*each) for each in (*half, lora))
    yield f"a KL of {kl} after 200, 1,000 and 5,000 rows, where LoRA has {of_lora}"
    yield f"Its loss is lower than LoRA's as well: {loss}"
    (loss, kl), (of_loss, of_kl), (last, at) = (
        [planned_mean(runs[method, 1000], key) for key in ("loss", "kl")]
        for method in ("full, equal loss", "LoRA", "full, equal KL")
    )
    yield f"With LoRA's loss, {loss} and {of_loss}, full fine-tuning has a KL of {kl}, and LoRA {of_kl}"
    by_seed = {
        method: ", ".join(str(sum(seed["intruders"])) for seed in runs[method, 1000]["outcomes"])
        for method in ("LoRA", "full, equal loss", "full, equal KL")
    }
    yield f"LoRA {by_seed['LoRA']}, full fine-tuning {by_seed['full, equal loss']}"
    yield f"At a KL of {at} full fine-tuning has {by_seed['full, equal KL']} intruders among 350, and a loss of {last}"


def slower():
    runs = {(run["method"], run["adapter"]): run for run in results("10_slower")}
    runs |= {(run["method"], "rate 0.004"): run for run in results("10_equal") if run["rows"] == 1000}
    for adapter in dict.fromkeys(adapter for _, adapter in runs):
        pair = [runs[method, adapter] for method in ("LoRA", "full, equal loss")]
        cells = [", ".join(planned_mean(run, key) for run in pair) for key in ("loss", "kl")]
        for run in pair:
            cells.append(" ".join(str(sum(seed["intruders"])) for seed in run["outcomes"]))
        yield f"| {adapter} | {span(pair[1]['rates'], 5)} | {' | '.join(cells)} |"


def eight_seeds():
    right = {run["method"]: planned_mean(run, "right", 1) for run in results("12_seeds")}
    yield f"at eight new seeds {right['DoRA']} for DoRA and {right['LoRA']} for LoRA"
    loss, kl = ({run["method"]: planned_mean(run, key) for run in results("12_seeds")} for key in ("loss", "kl"))
    yield f"{right['PiSSA']} against LoRA's {right['LoRA']}, with a loss of {loss['PiSSA']} against {loss['LoRA']}"
    lora, full, penalty = ((loss[method], kl[method]) for method in ("LoRA", "full", "KL penalty"))
    yield f"{lora[0]} for LoRA and {full[0]} for full fine-tuning, and the KL {lora[1]} and {full[1]}"
    yield f"the loss is {penalty[0]} with the penalty and {lora[0]} without, the KL {penalty[1]} and {lora[1]}"


def remedies():
    runs = {(run["remedy"], run["rows"]): run for run in results("10_replay") if run["factor"] == 1}
    base = {kind: f"{loss:.3f}" for kind, loss in results("10_replay", "before").items()}

    def of(key, *remedy, unit=1e-4):
        return planned_mean(runs[remedy], key, unit)

    replay, penalty, none = ("replay", 1), ("penalty", 1), ("none", 0)
    for kind in ("general", "foreign"):
        key = f"{kind} loss"
        yield f"{of(key, *replay)} with replay, {of(key, *none)} without, {base[kind]} in the base"
        yield f"replay is better: {of(key, *replay)} against {of(key, *penalty)}, where the base has {base[kind]}"
        yield f"in the loss ({paired(runs[penalty], runs[replay], key)}, not planned)"
    key = "general kl"
    yield f"{of(key, *replay)} with replay and {of(key, *none)} without"
    yield f"{of(key, *penalty)} with the penalty, {of(key, *replay)} with replay"
    yield f"with four rows a step {of(key, 'penalty', 4)} and {of(key, 'replay', 4)}"
    key = "foreign kl"
    yield f"{of(key, *penalty)} with the penalty, {of(key, *replay)} with replay, {of(key, *none)} with neither"
    yield f"Accuracy {of('right', *penalty, unit=1)} with the penalty, {of('right', *none, unit=1)} without"


def formats():
    loss = {run["way"]: planned_mean(run, "loss") for run in results("11_formats")}
    yield f"loss on both {loss['mean']} for the mean, {loss['TIES']} for TIES"
    yield f"loss {loss['TIES']} for TIES, {loss['whole']} for one adapter"


def rule():
    runs = {(run["steps"], run["alpha"]): run["runs"] for run in results("05_rule")}
    moved = {key: statistics.mean(run["moved"] for run in each) for key, each in runs.items()}
    yield f"After 400 steps A has moved {moved[400, 4]:.1f} times its start at α = 4, and {moved[400, 64]:.2f} times at"
    yield f"After 10 steps A has moved {moved[10, 4]:.2f} and {moved[10, 64]:.2f} times its start"
    for steps in (10, 400):
        low, high = (statistics.mean(run["log2"] for run in runs[steps, alpha]) for alpha in (64, 4))
        yield f"The rate falls by 2^{high - low:.2f} = {2 ** (high - low):.1f} times"
    for name, told in (
        ("05_rule_usual", "A has moved {:.1f} and {:.2f} times its start"),
        ("05_rule_start", "A moves {:.1f} and {:.1f} times its start in 100 steps"),
        ("05_rule_10m", "it moves {:.1f} and {:.1f} times its start"),
    ):
        (high, near), *between, (low, far) = (
            [statistics.mean(run[key] for run in each["runs"]) for key in ("log2", "moved")] for each in results(name)
        )
        for _, middle in between:
            yield f"At α = 16 A has moved {middle:.2f} times its start"
        yield told.format(near, far)
        yield f"the rate falls by 2^{high - low:.2f} = {2 ** (high - low):.1f} times"


def texts():
    for name, model in (("sizes_texts", "built-in"), ("sizes_texts_10m", "10M")):
        for kind in ("definitions", "foreign"):
            figures = {}
            for run in results(name):
                figures.setdefault(run["method"], []).append(planned_mean(run, kind, 1e-4))
            yield f"| {model} | {kind} | {' | '.join(', '.join(each) for each in figures.values())} |"


def own():
    runs = {(run["steps"], run["method"]): f"{run['rate']}: {planned_mean(run, 'loss')}" for run in results("12_own")}
    for steps in (31, 125):
        yield f"| {steps} | {' | '.join(runs[steps, method] for method in ('LoRA', 'PiSSA', 'LoRA+'))} |"
    best = {run["method"]: min(run["valid"].values()) for run in results("12_own") if run["steps"] == 125}
    yield f"by {best['PiSSA']:.3f} against {best['LoRA']:.3f}"


STORED = (
    own,
    sizes,
    texts,
    equal,
    slower,
    eight_seeds,
    remedies,
    formats,
    rule,
    rank,
    where,
    codes,
    intruders,
    methods,
    merging,
    clean_merging,
    specialists,
)


@pytest.mark.parametrize("figures", STORED)
def test_what_the_pages_repeat_is_what_the_experiment_has_stored(figures):
    pages = " ".join(" ".join(map(read, [CLAIMS, *OURS, "../README.md", "../tutorials/11_merging.md"])).split())
    missing = [figure for figure in figures() if figure not in pages]
    assert not missing


def runs_to_repeat(files):
    """Commands of the stored runs whose script or input is another one now, with what has changed."""
    repeat = {}
    for told in (json.loads(file.read_text(encoding="utf-8")) for file in files):
        changed = [
            path
            for path, known in told.get("files", {}).items()
            if hashlib.sha256((ROOT / path).read_bytes()).hexdigest()[:16] != known
        ]
        repeat |= {told["command"]: changed} if changed else {}
    return repeat


def test_stored_runs_are_those_of_the_scripts_and_inputs_that_are_here(tmp_path):
    assert not runs_to_repeat(path for path in EXPERIMENTS.glob("*.json") if path.name != "plans.json")
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"command": "python old.py", "files": {"README.md": "0123456789abcdef"}}), "utf-8")
    assert runs_to_repeat([old]) == {"python old.py": ["README.md"]}


@pytest.fixture(scope="module")
def verdicts():
    command = [sys.executable, EXPERIMENTS / "verdicts.py"]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout


def test_the_verdicts_are_those_of_the_rule(verdicts):
    page, words = read(CLAIMS), {}
    for line in verdicts.split("\n\n")[0].splitlines():
        word, more, half, compared, claim = re.fullmatch(r"(\D+?) +([+-]\S+) ± (\S+) +(.+?)  +(.+)", line).groups()
        sections = [" ".join(section.split("\n#")[0].split()) for section in page.split(f"### {claim}\n")[1:]]
        if where := re.search(
            r"(?:10M, |SmolLM2, |Gemma 3, )?[\d,]+ (?:rows|steps|seeds)$|(?:rate|rank) [\d.]+$|chosen rates$", compared
        ):
            section = next((each for each in sections if f"{where[0]}: {more} ± {half}, {word}" in each), "")
            assert section, line
            words.setdefault(section, set()).add(word)
        else:
            assert f"- Interval: {compared}: {more} ± {half}. - Verdict: {word}" in " ".join(sections), line
    planned, different, remain = re.search(
        r"^(\d+) intervals were planned, (\d+) different; Holm's correction leaves (\d+):$", verdicts, re.MULTILINE
    ).groups()
    number = {"3": "three"}[remain]
    told = f"Of the {planned} planned ones ({different} different: LoRA - full in the loss serves two claims)"
    assert told in " ".join(page.split())
    assert f"{number} remain after Holm's correction" in " ".join(page.split())
    for section, found in words.items():  # of several sizes the verdict may begin with that of one
        assert section.split("- Verdict: ")[1].startswith(tuple(found)), section


def test_the_overview_has_the_words_of_each_verdict():
    overview, _, sections = read(CLAIMS).partition("## The rule of verdicts")
    words = {}
    for claim, verdict in re.findall(r"^### (.+)\n(?:(?!###).*\n)*?- Verdict: ((?:.+\n?)+)", sections, re.MULTILINE):
        found = re.findall(r"^seen|not reproduced|reproduced|undecided|partly", " ".join(verdict.split()))
        words.setdefault(claim, []).append(", ".join(dict.fromkeys(found)))
    expected = [(claim, "; ".join(each)) for claim, each in words.items()]
    assert re.findall(r"^- \[(.+)\]\(#.+\): ([^(\n]+?)(?: \(.+\))?$", overview, re.MULTILINE) == expected


def numbers(text):
    text = re.sub(r"`.*?`|\]\(.*?\)|\[chapter \d+\]", "", text)  # neither flags nor links
    return set(re.findall(r"(?<![\w.,])\d+(?:[.,]\d+)*(?!\w)", text))


def linked(text):
    return [DOCS / path for path in re.findall(r"\]\(([\w./-]+\.md)", text)]


def told(page, section):
    """What a page says that we found: (its row or claim, the part with our figures)."""
    if page == CLAIMS:
        return re.findall(r"^(### .+\n\n(?:- Source.+\n)?(- Ours: (?:.+\n?)+))", section, re.MULTILINE)
    rows = re.findall(r"^\| (.+) \|$", section, re.MULTILINE)
    return [(row, " ".join(row.split(" | ")[OURS[page]])) for row in rows]


@pytest.mark.parametrize("page", [CLAIMS, *OURS])
def test_other_figures_are_on_the_pages_that_are_linked(page, verdicts):
    text = read(page).replace("\n  ", " ")
    for stored in STORED:
        for figure in stored():
            text = text.replace(figure, "")
    missing = {}
    for heading, *lines in map(str.splitlines, text.split("\n## ")[1:]):
        section = "\n".join(lines)
        for whole, ours in told(page, section):
            if sources := linked(heading + whole) or linked(section):
                known = numbers(" ".join([verdicts, *(path.read_text(encoding="utf-8") for path in sources)]))
                missing |= {whole: numbers(ours) - known} if numbers(ours) - known else {}
    assert not missing
