"""Files from outside run no code, take no more time and memory than their bytes call for, and are refused by name."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import minilora as ml
from minilora.cli import main, say
from minilora.files import ASSETS, open_file
from minilora.tools.inspect import inspect_path
from tests.files import saved, write_base
from tests.models import long, randn
from tests.reliability.watch import figures, watched

pytestmark = pytest.mark.reliability
measured = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured by Linux's /proc")
HARMLESS = {  # of the attacks: what they change has no effect, and is not said
    "config.json: 400 digits as the end of text: load",
    "config.json: code to run: load",
    "tokenizer.json: a text padded to 2^40",
    "tokenizer.json: a stride beyond the length",
    *(f"adapter_config.json: 9,999 keys of alpha_pattern: {way}" for way in ("load", "merge")),
    *(f"adapter_config.json: {what}: {way}" for what in ("a rank of 2^30", "code") for way in ("load", "merge")),
    *(f"adapter_config.json: the raw form of PiSSA: {way}" for way in ("load", "merge")),
    "adapter_config.json: alpha of 10^300: load",
    *(f"safetensors: an empty tensor of 2^{n}" for n in (63, 94)),
    *(f"a link to itself as {file}" for file in ("tokenizer_config.json", "chat_template.jinja")),  # as if not there
    *(f"a link to itself as {file}" for file in ("run.json", "metrics.jsonl")),
}


# How the names of the attacks begin, as docs/internals/verification.md has them.
KINDS = (("config.json", "JSON"), "adapter_config.json", "safetensors", "data", "a ", "tokenizer.json", "chat template")


@measured
def test_an_attack_is_refused_at_once_and_in_little_memory(tmp_path, capsys):
    found = watched("tests.reliability.attacks:calls", str(tmp_path))
    with capsys.disabled():
        for begin in KINDS:
            print(f"\n{begin}: {figures(each for each in found if each.name.startswith(begin))}")
    assert not [each.problem for each in found if each.problem]
    shown = {each.name for each in found if each.name.endswith(": inspect")}  # which say what is wrong
    assert {each.name for each in found if each.outcome == "read"} - shown == HARMLESS


LONG = {"structure": 20_000, "bytes": 20_000, "json": 10_000, "data": 2_000}
SHORT = {kind: count // 100 for kind, count in LONG.items()}


@measured
@pytest.mark.parametrize("counts", [SHORT, *long(*({kind: count} for kind, count in LONG.items()))], ids=str)
def test_a_changed_file_is_read_or_refused(counts, tmp_path, capsys):
    words = (f"{kind}={count}" for kind, count in counts.items())
    found = watched("tests.reliability.mutants:calls", str(tmp_path), *words)
    with capsys.disabled():
        print(f"\n{', '.join(counts)}: {figures(found)}")
    assert not [each.problem for each in found if each.problem]
    assert len(found) >= sum(counts.values())
    assert 0.2 < sum(each.outcome == "refused" for each in found) / len(found) < 1  # most changes matter, and not all


def test_a_process_that_dies_is_a_problem(tmp_path):
    found = watched("tests.reliability.mutants:calls", str(tmp_path), "nothing=1")
    assert "died with 1" in found[-1].problem


def test_links_within_a_directory_and_to_the_cache_of_the_hub_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    (snapshot / "again.json").symlink_to("config.json")
    for name in ("config.json", "again.json"):
        open_file(snapshot / name).close()
    (tmp_path / "other").symlink_to(snapshot)  # a directory that the user names may be a link
    open_file(tmp_path / "other" / "config.json").close()
    (snapshot / "out.json").symlink_to("../../secret")
    (tmp_path / "secret").write_text("{}")
    with pytest.raises(ml.FormatError, match=r"out\.json: is a link to .*secret, outside its directory"):
        open_file(snapshot / "out.json")
    open_file(snapshot / "out.json", is_named=True).close()  # the user named it


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "\x07", "\x9b31m", "\u202eabc", "a\rb", "\x00"])
def test_control_characters_of_a_file_do_not_reach_the_terminal(text, tmp_path, capsys):
    assert str(ml.FormatError(f"{text}: found")).isprintable()
    say(text)
    write_base(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    save_file({**tensors, f"model.{text}": randn(0, 2)}, tmp_path / "base" / "model.safetensors")
    main(["inspect", str(tmp_path / "base")])
    main(["eval", "--model", str(tmp_path / "base"), "--data", "none.jsonl"])
    main(["inspect", f"{tmp_path}/{text.replace(chr(0), '')}"])
    out = "".join(capsys.readouterr())
    assert all(c.isprintable() or c in "\n\t" for c in out)
    assert "model." in out


def test_merge_writes_no_name_of_code(tmp_path):
    model = saved(tmp_path / "adapter", target_modules=("q_proj",))
    ml.detach(model)
    ml.save_model(model, tmp_path / "base")
    config, code = tmp_path / "base" / "config.json", {"auto_map": {"AutoModel": "evil.Model"}}
    other = {"_attn_implementation_internal": "evil/kernel", "custom_pipelines": {"evil": {}}}
    config.write_text(json.dumps(json.loads(config.read_text()) | code | other))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (ASSETS / "model" / name).read_text()
        (tmp_path / "base" / name).write_text(json.dumps(json.loads(text) | code) if "config" in name else text)
    command = ["merge", "--model", tmp_path / "base", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out"]
    assert main(list(map(str, command))) == 0
    assert "evil" not in "".join(path.read_text() for path in (tmp_path / "out").glob("*.json"))


def test_inspect_says_what_it_takes(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ml.FormatError, match=r"metrics\.jsonl: not a safetensors file"):
        inspect_path(str(tmp_path / "metrics.jsonl"))
