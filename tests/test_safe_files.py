"""Files from outside, which may hold anything, and writing that is whole or not at all."""

import json
import math
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from minilora import FormatError, TrainingError
from minilora.files import (
    INDEX,
    MANIFEST,
    TensorFile,
    publishing,
    read_json,
    read_text,
    replacing,
    tensor_files,
    write_json,
    write_tensors,
)
from minilora.runs.directory import without_nan
from minilora.runs.lock import holds_files, locked
from tests.models import randn

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "U8": torch.uint8}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


def refuses(function, path):
    """The message with which a file is refused; it names the file."""
    with pytest.raises(FormatError) as error:
        function(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_what_is_no_json_object_is_refused(path):
    for content, message in (
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"a": 1}}', "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),  # a byte order mark
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),  # more digits than Python reads
        (b"[1]", "found a JSON list, need an object"),
        (b"null", "found a JSON NoneType, need an object"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
    ):
        path.write_bytes(content)
        assert message in refuses(read_json, path)


@pytest.mark.parametrize("read", [read_text, read_json, TensorFile])
def test_a_file_that_is_not_there_is_refused(read, path):
    refuses(read, path)
    path.mkdir()
    refuses(read, path)


def tensor_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        struct.pack("<Q", 10**18) + b"{}",  # a header longer than the file
        tensor_bytes(b"[]"),
        tensor_bytes({"a": ONE}, b"1234567"),  # a byte too few
        tensor_bytes({"a": ONE}, b"123456789"),  # a byte too many
        tensor_bytes({"a": {**ONE, "shape": [3]}}, b"12345678"),
        tensor_bytes({"a": {**ONE, "shape": [-2]}}, b"12345678"),
        tensor_bytes({"a": {**ONE, "dtype": "F33"}}, b"12345678"),
        tensor_bytes({"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, b"123456789012"),  # they overlap
        tensor_bytes({"__metadata__": {"format": 1}}),
        tensor_bytes({"a": list(ONE.values())}, b"12345678"),  # which safetensors itself reads
    ],
)
def test_what_is_no_safetensors_file_is_refused(content, path):
    path.write_bytes(content)
    assert "not a safetensors file" in refuses(TensorFile, path)


def test_a_tensor_that_cannot_be_read_is_refused(path):
    path.write_bytes(tensor_bytes({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, b"123"))
    assert "a cannot be read" in refuses(lambda path: TensorFile(path).read("a"), path)  # torch has no such numbers
    write_tensors(path, {"a": torch.ones(5000)})
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-4])
    assert "a cannot be read" in refuses(lambda _: file.read("a"), path)


@pytest.mark.parametrize("shape", [[0, 2**63], [0] * 65])
def test_a_shape_that_no_tensor_has_is_refused(shape, path):
    path.write_bytes(tensor_bytes({"a": {**ONE, "shape": shape, "data_offsets": [0, 0]}}))
    assert "a has a shape that no tensor can have" in refuses(TensorFile, path)


def test_looking_into_a_file_maps_none_of_it(path, monkeypatch):
    """PyTorch's way to map a file fails for one that is larger than the memory."""
    write_tensors(path, {"a": torch.ones(3)})
    monkeypatch.setattr(torch.UntypedStorage, "from_file", lambda *_: pytest.fail("the file was mapped as tensors"))
    assert TensorFile(path).shapes == {"a": (3,)}


@given(st.integers(0, 200), st.integers(0, 7), st.booleans())
def test_a_damaged_header_never_escapes_as_another_error(tmp_path_factory, position, bit, is_cut):
    path, content = tmp_path_factory.mktemp("st") / "file", bytearray(save({"a": torch.ones(3), "b": torch.ones(2, 2)}))
    position %= len(content)
    content[position] ^= 1 << bit
    path.write_bytes(content[:position] if is_cut else content)
    try:
        file = TensorFile(path)
        assert {name: tuple(file.read(name).shape) for name in file.shapes} == file.shapes
    except FormatError as error:
        assert str(path) in str(error)  # noqa: PT017 - either is right


def test_a_shard_that_is_no_plain_file_name_is_refused_and_an_index_without_a_map(tmp_path):
    path = tmp_path / INDEX
    for name in ("", ".", "..", "/etc/passwd", "../a", "a/b", "..\\a", "C:a", "a\0b", 3, None, ["model.safetensors"]):
        write_json(path, {"weight_map": {"a": "model.safetensors", "b": name}})
        assert f"{name!r} is not a plain file name" in refuses(lambda path: tensor_files(path.parent), path)
    for value in (None, [], "model.safetensors", 3):
        write_json(path, {"weight_map": value})
        assert "weight_map" in refuses(lambda path: tensor_files(path.parent), path)
    names = {"a": "model-00001-of-00002.safetensors", "b": "..model", "c": "mod el.é"}
    write_json(path, {"weight_map": names})
    for tensor, name in names.items():
        write_tensors(tmp_path / name, {tensor: torch.ones(3)})
    assert {tensor: file.path.name for tensor, file in tensor_files(tmp_path).items()} == names


def test_an_error_leaves_the_old_file_and_nothing_else(path):
    path.write_text("old")

    def fail(kind):
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise kind

    for kind in (KeyboardInterrupt, OSError, FormatError):
        with pytest.raises(kind):
            fail(kind)
        assert [file.name for file in path.parent.iterdir()] == ["file"]
        assert path.read_text() == "old"


def test_everything_is_flushed_before_it_gets_its_name_and_all_names_before_that_of_a_config(path, monkeypatch):
    """So a loss of power leaves what a kill may leave."""
    events = []
    for name in ("fsync", "replace", "unlink"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *names, call=call, name=name: (call(*names), events.append(name))[0])
    with replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("a")
        (temporary / "b").write_text("b")
    # two files, their directory; the new name
    assert events == ["fsync", "fsync", "fsync", "replace", "fsync"]
    for name in ("weights", "tokens", "config.json"):
        path.joinpath(name).write_text("old")
    events.clear()
    with publishing(path) as temporary:
        (temporary / "weights").write_text("new")
        (temporary / "tokens").write_text("new")
        (temporary / "config.json").write_text("new")
    # three files; the config is removed; weights with tokens, config and manifest get their names
    named = ["fsync", "replace", "replace", "fsync", "replace", "fsync", "replace", "fsync"]
    assert events == ["fsync", "fsync", "fsync", "unlink", *named]


def test_json_keeps_its_order_and_letters_and_missing_directories_are_made(path):
    path = path / "below" / "a"
    with replacing(path) as temporary:
        write_json(temporary, {"b": "ü—漢", "a": [1.5, None, True]})
    assert list(read_json(path).items()) == [("b", "ü—漢"), ("a", [1.5, None, True])]
    assert read_text(path).endswith("}\n")
    assert "ü—漢" in read_text(path)


def test_tensors_are_read_as_they_were_written(path):
    for dtype in DTYPES.values():
        tensors = {"a": randn(1, 3, 4), "transposed": randn(2, 3, 4).T, "empty": randn(3, 0), "scalar": randn(4, 1)[0]}
        tensors = {name: (9 * tensor).to(dtype) for name, tensor in tensors.items()}
        write_tensors(path, tensors, {"key": "value"})
        file = TensorFile(path)
        assert file.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert {name: entry.bytes for name, entry in file.entries.items()} == {n: t.nbytes for n, t in tensors.items()}
        assert {DTYPES[entry.dtype] for entry in file.entries.values()} == {dtype}
        assert file.metadata == {"format": "pt", "key": "value"}
        for name, tensor in tensors.items():
            assert file.read(name).dtype == dtype
            assert torch.equal(file.read(name), tensor)


def test_a_write_that_cannot_be_done_leaves_nothing_behind(path):
    resource = pytest.importorskip("resource", reason="limits of POSIX")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"file.*: cannot be written .*too large"), replacing(path) as temporary:
            write_tensors(temporary, {"a": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(path.parent.iterdir())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts what is mapped")
def test_a_tensor_that_is_let_go_leaves_nothing_mapped_and_no_file_open(path):
    write_tensors(path, {"a": torch.ones(5000), "b": torch.zeros(5000)})
    file = TensorFile(path)
    kept = file.read("b")
    for _ in range(50):
        file.read("a")
    assert Path("/proc/self/maps").read_text().count(str(path)) == 1
    assert not any(str(path) == str(handle.resolve()) for handle in Path("/proc/self/fd").iterdir())
    assert not kept.any()


def test_temporary_files_of_other_programs_are_files_and_stay(tmp_path):
    (tmp_path / ".draft.tmp").mkdir()
    (tmp_path / ".draft.tmp" / "notes.txt").write_text("mine")
    (tmp_path / f".out.{os.getpid()}.tmp").mkdir()
    assert holds_files(tmp_path)
    with locked(tmp_path):
        pass
    assert {path.name for path in tmp_path.glob(".*.tmp")} == {".draft.tmp"}
    with publishing(tmp_path / ".q.tmp") as directory:
        (directory / "config.json").write_text("{}")
    assert (tmp_path / ".q.tmp" / MANIFEST).is_file()


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "letter.txt")
    with pytest.raises(TrainingError, match=r"run: cannot be written"), locked(tmp_path / "run"):
        pass
    assert (tmp_path / "letter.txt").read_text() == "mine"


def test_numbers_that_json_does_not_have_are_null():
    line = without_nan({"loss": math.nan, "samples": [{"score": -math.inf}], "step": 1})
    assert line == {"loss": None, "samples": [{"score": None}], "step": 1}


def test_a_dtype_that_no_file_has_is_named(tmp_path):
    with pytest.raises(FormatError, match=r"w is torch.complex64; supported are \['F64'"):
        write_tensors(tmp_path / "a.safetensors", {"w": torch.zeros(2, dtype=torch.complex64)})


def test_a_file_of_many_tensors_is_read_as_it_was_written(tmp_path):
    tensors = dict.fromkeys((f"{i:060}" for i in range(90_000)), torch.zeros(1))  # a header above `JSON_BYTES`
    write_tensors(tmp_path / "a.safetensors", tensors)
    assert TensorFile(tmp_path / "a.safetensors").shapes.keys() == tensors.keys()
