"""Hostile ONNX files: each is refused with an error that names the fault, before memory is spent; the model stays as it is."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from nestpatch.cli import main
from nestpatch.errors import CheckpointFormatError
from nestpatch.formats import protobuf as wire
from nestpatch.formats.onnx import graph
from nestpatch.formats.opening import open_checkpoint
from tests.helpers import PROPERTY, tiny_checkpoint, tree_digest
from tests.onnx.files import build, save
from tests.onnx.messages import claim, external, message, model, number, tensor, varint

RAW = message(9, bytes(64))
NODE = message(1, message(1, "x"), message(1, "w"), message(2, "y"), message(4, "MatMul"))


def nested(depth: int) -> bytes:
    """Graphs inside nodes inside graphs."""
    content = b""
    for _ in range(depth):
        content = message(1, message(4, "If"), message(5, message(1, "then_branch"), message(6, content)))
    return content


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it has no graph"),
    "another format": (b"GGUF" + bytes(60), "is not a sound ONNX model"),
    "a text": (b"{}" * 40, "is not a sound ONNX model"),
    "no graph": (number(1, 10), "it has no graph"),
    "two graphs": (model(NODE) + message(7, NODE), "it has 2 graphs"),
    "a graph that is a number": (number(7, 5), "field 7 is not a message"),
    "a graph longer than the file": (number(1, 10) + claim(7, 1000, NODE), "a field claims 1000 bytes where"),
    "a graph of exabytes": (claim(7, (1 << 63) - 1), "a field claims 9223372036854775807 bytes"),
    "a node longer than its graph": (message(7, claim(1, 99)), "a field claims 99 bytes where 0 are left"),
    "a name of gigabytes": (message(7, message(1, claim(4, 1 << 30))), "a field claims 1073741824 bytes"),
    "a number without end": (b"\x08" + b"\xff" * 20, "a number has no end"),
    "a number that ends the file": (b"\x08\xff", "a number has no end"),
    "a group": (b"\x0b\x0c", "wire type 3"),
    "an unknown wire type": (b"\x0f", "wire type 7"),
    "field zero": (b"\x00\x00", "impossible number 0"),
    "half of a fixed number": (b"\x09\x00\x00", "a field claims 8 bytes where 2 are left"),
    "a name that is no text": (model(message(1, message(4, b"\xff\xfe"))), "codec can't decode"),
    "a name that is a number": (model(message(1, number(4, 7))), "field 4 is not a text"),
    "an input whose name is a number": (model(message(11, number(1, 5))), "field 1 is not a text"),
    "an input that is a number": (model(number(11, 5)), "field 11 is not a message"),
    "graphs without end": (model(nested(20)), "nested more than 8 deep"),
    "a tensor twice": (model(tensor(RAW), tensor(RAW)), "duplicate tensor 'w'"),
    "an unknown type": (model(tensor(RAW, kind=77)), "unknown type 77"),
    "no type": (model(tensor(RAW, kind=0)), "unknown type 0"),
    "a negative shape": (model(tensor(RAW, shape=((1 << 64) - 4, 4))), "impossible shape"),
    "a shape that overflows": (model(tensor(RAW, shape=(1 << 40, 1 << 40))), "impossible shape"),
    "a shape of 40 dimensions": (model(tensor(RAW, shape=(1,) * 40)), "more than 16 dimensions"),
    "a packed shape without end": (model(message(5, message(1, b"\xff" * 9), number(2, 1))), "a number has no end"),
    "data shorter than the shape": (model(tensor(message(9, bytes(60)))), "needs 64 bytes and has 60"),
    "data longer than the shape": (model(tensor(message(9, bytes(68)))), "needs 64 bytes and has 68"),
    "data twice": (model(tensor(RAW, RAW)), "has its data twice"),
    "data inside and beside": (model(tensor(RAW, external())), "both inside the model and in another file"),
    "floats and more": (model(tensor(message(4, bytes(32)))), "needs 64 bytes and has 32"),
    "segments": (model(tensor(RAW, message(3, number(1, 0)))), "cut into segments"),
    "data outside": (model(tensor(external(location="../data"))), "not a plain name of a file in the model's directory"),
    "data at an absolute place": (model(tensor(external(location="/etc/passwd"))), "not a plain name"),
    "data below": (model(tensor(external(location="sub/data"))), "not a plain name"),
    "data outside on Windows": (model(tensor(external(location="..\\data"))), "not a plain name"),
    "data in memory": (model(tensor(external(location="*/_ORT_MEM_ADDR_/*"))), "not a plain name"),
    "data in the folder above": (model(tensor(external(location=".."))), "not a plain name"),
    "data without a place": (model(tensor(external(location=""))), "not a plain name"),
    "data with a NUL": (model(tensor(external(location="data\0"))), "not a plain name"),
    "data of an endless name": (model(tensor(external(location="x" * 300))), "which is missing"),
    "data missing": (model(tensor(external(location="gone"))), "has weights in gone, which is missing"),
    "data in a directory": (model(tensor(external(location="folder"))), "has weights in folder, which is missing"),
    "data in the model itself": (model(tensor(external(location="model.onnx"))), "inside the model itself"),
    "data shorter than said": (model(tensor(external(offset="68"))), "ends at byte 132 of data, which has 128"),
    "data beyond the file": (model(tensor(external(offset="9" * 18))), "which has 128"),
    "data of another length": (model(tensor(external(length="60"))), "needs 64 bytes and has 60 in data"),
    "a negative offset": (model(tensor(external(offset="-4"))), "impossible offset '-4'"),
    "an offset of 5000 digits": (model(tensor(external(offset="9" * 5000))), "impossible offset"),
    "an offset in other digits": (model(tensor(external(offset="٤"))), "impossible offset"),
    "an offset twice": (
        model(tensor(external(offset="0"), message(13, message(1, "offset"), message(2, "4")))),
        "has the duplicate key 'offset'",
    ),
    "data that overlaps": (
        model(tensor(external(offset="0")), tensor(external(offset="32"), name="v")),
        "the data of tensors 'w' and 'v' overlap in data",
    ),
    "data inside other data": (
        model(tensor(external()), tensor(external(offset="16"), shape=(4,), name="v")),
        "overlap in data",
    ),
    "a terminal escape in a name": (model(tensor(RAW, name="\x1b[2J", kind=77)), "unknown type 77"),
}  # fmt: skip


def place(folder: Path, content: bytes) -> Path:
    """A model with a data file of 128 bytes beside it."""
    (folder / "model" / "folder").mkdir(parents=True)
    (folder / "model" / "data").write_bytes(bytes(range(128)))
    (folder / "model" / "model.onnx").write_bytes(content)
    return folder / "model" / "model.onnx"


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_name(case: str, shop: Path, tmp_path: Path) -> None:
    content, says = HOSTILE[case]
    path = place(tmp_path, content)
    before = tree_digest(tmp_path)
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(path)
    assert says in str(caught.value)
    assert caught.value.advice
    for arguments in (
        ["verify", path],
        ["apply", path, shop / "p.nest", "--in-place"],
        ["apply", path.parent, shop / "p.nest"],
    ):
        result = CliRunner().invoke(main, [str(word) for word in arguments])
        assert (result.exit_code, type(result.exception)) == (1, SystemExit), result.exception
        assert result.stderr.startswith("CheckpointFormatError: ")
        assert {c for c in result.stderr if ord(c) < 32} <= {"\n"}, "a hostile text reaches the terminal"
    assert tree_digest(tmp_path) == before


def test_the_honest_file_is_read(tmp_path: Path) -> None:
    """Without this, the files above could be refused for a reason that has nothing to do with them."""
    checkpoint = open_checkpoint(place(tmp_path, model(NODE, tensor(external(offset="64", length="64")))))
    assert (checkpoint.info("w").offset, checkpoint.info("w").shape) == (64, (4, 4))
    assert b"".join(checkpoint.read_all("w"))[:8] == bytes([64, 65, 66, 67, 80, 81, 82, 83]), "a row is a column of the file"


def test_floods_end_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts, not memory, end a file of millions of fields, numbers, names or nodes."""
    floods = {
        "fields": (wire, "MAX_FIELDS", 100, model(number(99, 1) * 200), "more than 100 fields"),
        "dimensions": (wire, "MAX_FIELDS", 100, model(tensor(message(5, varint(1) * 200), RAW)), None),
        "numbers": (
            wire,
            "MAX_FIELDS",
            100,
            model(message(1, message(5, message(8, varint(1) * 200)))),
            "more than 100 fields",
        ),
        "names": (wire, "MAX_TEXTS", 100, model(*(message(1, message(4, "x" * 30)) for _ in range(9))), "a text claims"),
        "nodes": (graph, "MAX_NODES", 100, model(message(1) * 200), "more than 100 nodes"),
    }
    for name, (module, limit, value, content, says) in floods.items():
        path = place(tmp_path / name, content)
        with monkeypatch.context() as patch:
            patch.setattr(module, limit, value)
            if says is None:
                open_checkpoint(path)
                continue
            with pytest.raises(CheckpointFormatError, match=says):
                open_checkpoint(path)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = place(tmp_path, model(NODE, tensor(external())))
    checkpoint = open_checkpoint(path)
    (path.parent / "data").write_bytes(bytes(60))
    with pytest.raises(CheckpointFormatError, match="ends inside tensor w"):
        checkpoint.read_rows("w", np.arange(4))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    return save(build(tiny_checkpoint(folder / "base", dtype="F32", hidden=16, inter=24, layers=1), "scoped"), folder)


@PROPERTY
@given(data=st.data())
def test_any_damage_is_an_error_or_no_damage(data: st.DataObject, sound: Path) -> None:
    """Whatever happens to the graph: it opens, or it is refused by name; the tensors are inside its files."""
    whole = bytearray(sound.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(whole))))
    path = sound.with_name("damaged.onnx")
    path.write_bytes(bytes(whole[:cut]))
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointFormatError:
        return
    for name in checkpoint.tensors():
        info = checkpoint.info(name)
        assert info.offset + info.nbytes <= info.file.stat().st_size
        assert sum(map(len, checkpoint.read_all(name))) == info.nbytes


def test_reading_never_needs_more_than_the_graph(tmp_path: Path) -> None:
    """A model that says it has a terabyte of data, in a sparse file that has."""
    size = 1 << 40
    rows = size // (4 * 4096)
    try:
        with open(tmp_path / "data", "wb") as file:
            file.truncate(size)
    except OSError:
        pytest.skip("no sparse files of this size here")
    (tmp_path / "model.onnx").write_bytes(model(NODE, tensor(external(), shape=(4096, rows))))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.info("w").shape == (rows, 4096)
    assert not checkpoint.read_rows("w", np.array([7])).any()


def test_numbers_are_read_as_protobuf_writes_them(tmp_path: Path) -> None:
    """Fixed and packed fields, and unknown fields."""
    shape = message(1, varint(4), varint(4))
    noise = number(999, 1 << 63) + varint(998 << 3 | 1) + struct.pack("<d", 1.5) + varint(997 << 3 | 5) + bytes(4)
    content = noise + message(7, noise, NODE, message(5, shape, noise, number(2, 1), message(8, "w"), RAW))
    assert open_checkpoint(place(tmp_path, content)).info("w").shape == (4, 4)
