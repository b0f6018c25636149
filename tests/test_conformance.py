"""The conformance kit: it is what its script makes, and its tolerances and verdicts tell mistakes apart.

Mistaken readers are planted by other files: minilora reads them as a mistaken reader reads the kit's.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conformance import make, run
from conformance.readers import minilora_reader
from minilora import MiniloraError

CASES, LOGITS = run.read_kit()
PAGE = (run.HERE / "README.md").read_text(encoding="utf-8")
DTYPES = ("float32", "bfloat16")
every = pytest.mark.parametrize("name", CASES)


def readings(name):
    return run.readings_of(name, CASES[name], LOGITS)


def column(reader, page=PAGE, title="## What readers do"):
    """What the table below the title says of each case in the column of a reader."""
    header, *rows = re.findall(r"^\| .* \|$", page.partition(title)[2], flags=re.MULTILINE)
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in (header, *rows)]
    return {row[0]: row[cells[0].index(reader)] for row in cells[1:]}


def verdict(reader, name, dtype="float32", base=None, adapters=None):
    """What the runner says of a reader in this process, perhaps of other files than the kit's."""
    case = CASES[name]
    paths = [run.HERE / path for path in case["adapters"]] if adapters is None else adapters
    try:
        found = reader.logits(base or run.HERE / case["base"], case["tokens"], paths, dtype)
    except MiniloraError:
        return "refused"
    return run.judge(found, readings(name), case["tolerance"][dtype])[0]


def test_the_kit_is_what_its_script_makes(tmp_path):
    make.main(tmp_path)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    assert made == {name: (run.HERE / name).read_bytes() for name in made}
    stored = [*(run.HERE / "bases").rglob("*.*"), *(run.HERE / "adapters").rglob("*.*")]
    assert {path.relative_to(run.HERE) for path in stored} <= made.keys()
    assert sum(map(len, made.values())) < 1_000_000


def test_files_that_were_changed_are_not_judged_by(tmp_path):
    shutil.copytree(run.HERE, tmp_path / "kit")
    run.read_kit(tmp_path / "kit")
    (tmp_path / "kit" / "bases" / "qwen3" / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="config"):
        run.read_kit(tmp_path / "kit")


@pytest.mark.parametrize("dtype", DTYPES)
@every
def test_a_tolerance_rejects_every_mistake_by_a_factor_of_ten(name, dtype):
    right, *wrong = readings(name).values()
    assert all(run.distance(logits, right) >= 10 * CASES[name]["tolerance"][dtype] for logits in wrong)


@every
def test_known_mistakes_are_told_from_each_other(name):
    for label, logits in readings(name).items():
        assert run.judge(logits, readings(name), CASES[name]["tolerance"]["bfloat16"])[0] == label


def test_an_adapter_and_the_same_merged_have_the_same_logits():
    assert np.array_equal(LOGITS["merged"], LOGITS["plain"])


@pytest.mark.parametrize("dtype", DTYPES)
@every
def test_minilora_reads_the_kit_as_the_page_says(name, dtype):
    assert verdict(minilora_reader, name, dtype) == column("minilora")[name]


def of_values(**changes):
    return lambda values, tensors: (values | changes, tensors)


def of_patterns(change):
    return lambda values, tensors: (values | {"alpha_pattern": dict(change(values["alpha_pattern"].items()))}, tensors)


def of_pairs(turn):
    """Other factors in place of A and B."""

    def change(values, tensors):
        changed = dict(tensors)
        for name in (name for name in tensors if name.endswith("lora_A.weight")):
            pair = name, name.replace("lora_A", "lora_B")
            changed |= dict(zip(pair, map(np.ascontiguousarray, turn(*(tensors[key] for key in pair))), strict=True))
        return values, changed

    return change


def without(*parts, **changes):
    def change(values, tensors):
        return values | changes, {name: t for name, t in tensors.items() if not any(part in name for part in parts)}

    return change


PLANTED = {  # the verdict -> the case, and how a mistaken reader takes its files
    "wrong scale: α/r": ("rslora", of_values(use_rslora=False)),
    "wrong scale: α/√r": ("plain", of_values(use_rslora=True)),
    "wrong scale: 1": ("plain", of_values(lora_alpha=5)),
    "wrong scale: α": ("plain", of_values(lora_alpha=75)),
    "wrong scale: (α/r)²": ("plain", of_values(lora_alpha=45)),
    "wrong α: 16 if missing": ("layers", of_values(lora_alpha=16)),
    "wrong α: without alpha_pattern": ("patterns", of_values(alpha_pattern={})),
    "wrong α: of the last key that matches": ("patterns", of_patterns(lambda items: reversed(items))),
    "wrong α: no key with ^ matches": ("patterns", of_patterns(lambda items: (i for i in items if i[0][0] != "^"))),
    "wrong orientation: A and B exchanged": ("square", of_pairs(lambda A, B: (B, A))),
    "wrong orientation: B A transposed": ("square", of_pairs(lambda A, B: (B.T, A.T))),
    "wrong orientation: A and B read by columns": (
        "plain",
        of_pairs(lambda A, B: (A.reshape(A.shape[::-1]).T, B.reshape(B.shape[::-1]).T)),
    ),
    "part ignored: the magnitude": ("dora", without("magnitude", use_dora=False)),
    "part ignored: trained biases": ("biases", without("bias", bias="none")),
    "wrong biases: that of B in place of another": (
        "lora-bias",
        lambda values, tensors: (values, {name: t * ("base_layer" not in name) for name, t in tensors.items()}),
    ),
    "part ignored: modules in full": ("full", without("embed_tokens", "lm_head", modules_to_save=None)),
    "part ignored: the head in full": ("full", without("lm_head", modules_to_save=["embed_tokens"])),
    "part ignored: A and B of the head": (
        "embedding",
        without("lm_head", target_modules=["embed_tokens", "v_proj"]),
    ),
    "part ignored: subnormal numbers of float16": (
        "half",
        lambda values, tensors: (values, {name: t * (abs(t) >= 2.0**-14) for name, t in tensors.items()}),
    ),
    "part ignored: token rows": ("rows", without("token_adapter", trainable_token_indices=None)),
    "refused": ("plain", of_values(target_parameters=["experts"])),
    "other": ("plain", of_values(lora_alpha=19)),
}


@pytest.mark.parametrize("expected", PLANTED)
def test_a_planted_reader_gets_the_verdict_of_its_mistake(expected, tmp_path):
    name, mistake = PLANTED[expected]
    (adapter,) = (run.HERE / path for path in CASES[name]["adapters"])
    values = json.loads((adapter / "adapter_config.json").read_bytes())
    values, tensors = mistake(values, load_file(adapter / "adapter_model.safetensors"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert verdict(minilora_reader, name, adapters=[tmp_path]) == expected


def test_a_reader_that_leaves_the_adapter_out_does_nothing():
    for name, case in CASES.items():
        if case["adapters"]:
            assert verdict(minilora_reader, name, adapters=[]) == "does nothing"
    assert verdict(minilora_reader, "sum", adapters=[run.HERE / "adapters/plain"]) == "part ignored: the second adapter"


READER = """
import shutil, sys
from pathlib import Path

base, tokens, out, *adapters = map(Path, sys.argv[1:])
name = "+".join(path.name for path in (base, *adapters))
assert tokens.read_text().count(",") == 9
if name == "gemma3+wrapper":
    sys.exit("throw new Error(text)\\n    ^\\nTypeError: names that this reader lacks\\n    at line 7\\nEnd")
if name != "qwen3+patterns":
    shutil.copy(next(Path(__file__).parent.glob(name + ".*")), out)
"""


def printed_by(command, capsys):
    """The runner's status, its verdicts by case, and its last line."""
    status, out = run.main(["--", *map(str, command)]), capsys.readouterr().out
    return status, dict(re.findall(r"^\| ([\w-]+) \| (.+?) \|", out, flags=re.MULTILINE)), out.splitlines()[-1]


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("open(sys.argv[3], 'w').write('[' * 100_000)", "other: neither .npy nor JSON of numbers"),
        ("open(sys.argv[3], 'w').write(f'[1{400 * str(0)}]')", "other: neither .npy nor JSON of numbers"),
        ("os.mkdir(sys.argv[3])", "other: no file"),
        (r"sys.exit(sys.stderr.buffer.write(b'\xff no'))", "refused: \ufffd no"),
    ],
)
def test_what_a_reader_says_or_writes_never_stops_the_runner(answer, verdict, monkeypatch):
    monkeypatch.setenv("PYTHONUTF8", "1")
    assert run.ask([sys.executable, "-c", f"import os, sys; {answer}"], CASES["plain"], run.HERE) == verdict


def test_the_runner_prints_what_a_command_computes(tmp_path, capsys):
    (tmp_path / "reader.py").write_text(READER)
    expected = {"case": "verdict", **dict.fromkeys(CASES, "right")}
    for name, case in CASES.items():
        file = tmp_path / "+".join(Path(path).name for path in (case["base"], *case["adapters"]))
        np.save(f"{file}.npy", readings(name)["right"].astype(np.float32))
    for name in ("qwen3+patterns", "llama-tied+rows"):
        (tmp_path / f"{name}.npy").unlink()
    (tmp_path / "llama-tied+rows.json").write_text(json.dumps(readings("rows")["right"].tolist()))
    refusals = {"patterns": "other: no file", "wrapper": "refused: TypeError: names that this reader lacks"}
    status, verdicts, total = printed_by([sys.executable, tmp_path / "reader.py"], capsys)
    assert verdicts == expected | refusals
    assert (status, total) == (1, "22 right, 1 other, 1 refused")

    np.save(tmp_path / "qwen3+patterns.npy", readings("patterns")["right"])
    (tmp_path / "reader.py").write_text(READER.replace("qwen3+patterns", ""))
    assert printed_by([sys.executable, tmp_path / "reader.py"], capsys)[0] == 0  # all is right or an adapter refused

    (tmp_path / "gemma3+half.npy").write_text("[[0.5]]")
    (tmp_path / "llama+plain.npy").write_text(json.dumps(readings("plain")["does nothing"].tolist()))
    (tmp_path / "llama+rslora.npy").write_text("logits")
    np.save(tmp_path / "llama+dora.npy", np.full_like(readings("dora")["right"], np.nan))
    np.save(tmp_path / "llama-tied+dora.npy", np.full_like(readings("dora")["right"], np.nan))
    mistakes = {"half": "other: shape (1, 1), not (10, 32)", "plain": "does nothing", "dora": "other: not finite"}
    mistakes |= {"rslora": "other: neither .npy nor JSON of numbers", "wrapper": refusals["wrapper"]}
    assert printed_by([sys.executable, tmp_path / "reader.py"], capsys)[1] == expected | mistakes


def test_a_command_that_refuses_a_base_or_does_not_run_fails(capsys):
    status, verdicts, total = printed_by([sys.executable, "-c", "raise SystemExit(3)"], capsys)
    assert (status, total) == (1, f"{len(CASES)} refused")
    assert verdicts["plain"] == "refused: status 3, no message"
    with pytest.raises(SystemExit, match="absent: No such file or directory"):
        run.main(["--", "absent"])
