"""Broken and hostile models: each is refused by name, without a traceback and without a change on disk."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from nestpatch.cli import main
from nestpatch.errors import CheckpointFormatError
from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from tests.attacks.tools import join
from tests.helpers import places, tiny_checkpoint, tiny_pack, tree_digest

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
OTHER = {FIRST: SECOND, SECOND: FIRST}
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single-file model, a sharded one, and the pack that fits both."""
    folder = tmp_path_factory.mktemp("shop")
    nest.write(tiny_pack(tiny_checkpoint(folder / "single")), folder / "good.nest")
    tiny_checkpoint(folder / "sharded", sharded=True)
    return folder


def assert_refused(model: Path, pack: Path, says: str, kind: str = "CheckpointFormatError", code: int = 1) -> None:
    """Both the library and the command line name the fault; nothing changes. kind, code: of the command line."""
    before = tree_digest(model.parent)
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(model)
    assert type(caught.value) is CheckpointFormatError
    assert says in str(caught.value)
    assert caught.value.advice.strip()
    result = CliRunner().invoke(main, ["apply", str(model), str(pack)])
    assert tree_digest(model.parent) == before
    assert result.exit_code == code
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith(f"{kind}: ")
    assert "Traceback" not in result.stderr
    assert {c for c in result.stderr if ord(c) < 32} <= {"\n"}, "a hostile text reaches the terminal"


def raw(header: Any, body: bytes = b"") -> bytes:
    """A safetensors file with this header, whatever it is."""
    return join(header if isinstance(header, (str, bytes)) else json.dumps(header), body, padding=b"")


def entry(start: Any, stop: Any, **fields: Any) -> dict[str, Any]:
    """A header entry of one F32 vector that fits its bytes, with other fields."""
    length = (stop - start) // 4 if isinstance(start, int) and isinstance(stop, int) else 1
    return {"dtype": "F32", "shape": [length], "data_offsets": [start, stop]} | fields


FILES: dict[str, tuple[bytes | Callable[[bytes], bytes], str]] = {
    "empty": (b"", "header of 0 bytes in 0"),
    "no prefix": (b"\x10\0\0", "header of 0 bytes in 3"),
    "only a prefix": (struct.pack("<Q", 64), "header of 64 bytes in 8"),
    "truncated": (lambda good: good[:-1], "is truncated"),
    "half": (lambda good: good[: len(good) // 2], "is truncated"),
    "longer": (lambda good: good + b"\0", "is longer than its header says"),
    "truncated in the header": (lambda good: good[:60], "is not a safetensors file"),
    "header claims everything": (lambda good: b"\xff" * 8 + good[8:], "header of 18446744073709551615 bytes"),
    "header claims the file and more": (lambda good: struct.pack("<Q", len(good) - 7) + good[8:], "is not a safetensors file"),
    "header claims too much": (lambda good: shifted(good, 64), "is broken"),
    "header claims too little": (lambda good: shifted(good, -64), "is broken"),
    "overlap": (raw({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "tensor b overlaps the one before"),
    "inside another": (raw({"a": entry(0, 12), "b": entry(4, 8)}, bytes(12)), "tensor b overlaps the one before"),
    "gap": (raw({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)), "tensor b leaves a gap"),
    "gap at the start": (raw({"a": entry(4, 8)}, bytes(8)), "tensor a leaves a gap"),
    "key twice": (raw('{"a":%s,"a":%s}' % ((json.dumps(entry(0, 4)),) * 2), bytes(4)), "duplicate key"),
    "field twice": (raw('{"a":{"dtype":"F32","shape":[2],"shape":[1],"data_offsets":[0,4]}}', bytes(4)), "duplicate key"),
    "not UTF-8": (raw(b'{"\xff":{}}'), "is broken"),
    "UTF-16": (raw(json.dumps({"a": entry(0, 4)}).encode("utf-16"), bytes(4)), "is broken"),
    "no JSON": (raw("{"), "is not a safetensors file"),
    "a list": (raw("[]"), "is broken"),
    "a number": (raw("12"), "is broken"),
    "deep": (raw('{"a":' * 100_000 + "1" + "}" * 100_000), "is broken"),
    "metadata is a list": (raw({"__metadata__": []}), "is broken"),
    "metadata is null": (raw({"__metadata__": None}), "is broken"),
    "entry is null": (raw({"a": None}), "is broken"),
    "no offsets": (raw({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "is broken"),
    "three offsets": (raw({"a": entry(0, 4, data_offsets=[0, 4, 4])}, bytes(4)), "is broken"),
    "negative offset": (raw({"a": entry(-4, 0)}, bytes(4)), "impossible shape or offset"),
    "boolean offset": (raw({"a": entry(False, 4, shape=[1])}, bytes(4)), "impossible shape or offset"),
    "float offset": (raw({"a": entry(0.0, 4)}, bytes(4)), "impossible shape or offset"),
    "negative shape": (raw({"a": entry(0, 4, shape=[-1, -1])}, bytes(4)), "impossible shape or offset"),
    "boolean shape": (raw({"a": entry(0, 4, shape=[True])}, bytes(4)), "impossible shape or offset"),
    "shape is a text": (raw({"a": entry(0, 4, shape="1")}, bytes(4)), "impossible shape or offset"),
    "shape against bytes": (raw({"a": entry(0, 4, shape=[2])}, bytes(4)), "disagree with its 4 bytes"),
    "shape overflows": (raw({"a": entry(0, 0, shape=[2**62, 16])}), "disagree with its 0 bytes"),
    "dtype against bytes": (raw({"a": entry(0, 4, dtype="F16")}, bytes(4)), "disagree with its 4 bytes"),
    "dtype unknown": (raw({"a": entry(0, 4, dtype="F33")}, bytes(4)), "is broken"),
    "dtype is a list": (raw({"a": entry(0, 4, dtype=["F32"])}, bytes(4)), "is broken"),
    "offset of 5000 digits": (raw('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,%s]}}' % ("9" * 5000)), "is broken"),
    "terminal escape in a name": (raw({"\x1b[2J": entry(4, 8)}, bytes(8)), "leaves a gap"),
    "a pickle": (b"PK\x03\x04\0\0\x08\x08" + bytes(99), "is not a safetensors file"),
}  # fmt: skip


def shifted(good: bytes, by: int) -> bytes:
    """The same file with a false header length."""
    (length,) = struct.unpack("<Q", good[:8])
    return struct.pack("<Q", length + by) + good[8:]


@pytest.mark.parametrize("kind", ["file", "directory", "shard"])
@pytest.mark.parametrize("case", FILES)
def test_a_broken_file_is_refused(case: str, kind: str, shop: Path, tmp_path: Path) -> None:
    content, says = FILES[case]
    model = tmp_path / "model"
    shutil.copytree(shop / ("sharded" if kind == "shard" else "single"), model)
    file = model / (SECOND if kind == "shard" else "model.safetensors")
    file.write_bytes(content(file.read_bytes()) if callable(content) else content)
    assert_refused(file if kind == "file" else model, shop / "good.nest", says)


def reindex(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Changes the weight_map of a sharded model."""

    def apply(model: Path) -> None:
        index = json.loads((model / INDEX).read_text())
        change(index["weight_map"])
        (model / INDEX).write_text(json.dumps(index))

    return apply


def index_is(text: str | bytes) -> Callable[[Path], Any]:
    return lambda model: (model / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())


def double_tensor(model: Path) -> None:
    """The second shard becomes a copy of the first, and so holds its tensors too."""
    shutil.copy(model / FIRST, model / SECOND)


def shard_is_a_directory(model: Path) -> None:
    (model / SECOND).unlink()
    (model / SECOND).mkdir()


def shard_is_a_dangling_link(model: Path) -> None:
    (model / SECOND).unlink()
    (model / SECOND).symlink_to(model / "blob")


def outside(model: Path) -> None:
    """The shard that the index reaches for is there, and sound."""
    shutil.copy(model / FIRST, model.parent / "x.safetensors")
    reindex(lambda m: m.update({NORM: "../x.safetensors"}))(model)


DIRECTORIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard outside": (outside, "names the shard '../x.safetensors', which is not a plain file name"),
    "shard absolute": (reindex(lambda m: m.update({NORM: "/etc/x.safetensors"})), "which is not a plain file name"),
    "shard below": (reindex(lambda m: m.update({NORM: "sub/x.safetensors"})), "which is not a plain file name"),
    "shard outside on Windows": (reindex(lambda m: m.update({NORM: "..\\x.safetensors"})), "which is not a plain file name"),
    "shard of another kind": (reindex(lambda m: m.update({NORM: "config.json"})), "which is not a plain file name"),
    "shard is a number": (reindex(lambda m: m.update({NORM: 1})), "which is not a plain file name"),
    "shard with a NUL": (reindex(lambda m: m.update({NORM: "\0.safetensors"})), "which is missing"),
    "shard with half a character": (reindex(lambda m: m.update({NORM: "\ud800.safetensors"})), "which is missing"),
    "shard of an endless name": (reindex(lambda m: m.update({NORM: "x" * 300 + ".safetensors"})), INDEX),
    "shard missing": (lambda model: (model / SECOND).unlink(), f"names {SECOND}, which is missing"),
    "shard is a directory": (shard_is_a_directory, f"names {SECOND}, which is missing"),
    "shard is a dangling link": (shard_is_a_dangling_link, f"names {SECOND}, which is missing"),
    "tensor in two shards": (double_tensor, f"is both in {FIRST} and in {SECOND}"),
    "tensor in another shard": (reindex(lambda m: m.update({NORM: OTHER[m[NORM]]})), f"says that tensor {NORM} is in"),
    "tensor in no shard": (reindex(lambda m: m.update(ghost=FIRST)), f"says that tensor ghost is in {FIRST}, and it is not"),
    "index without a map": (index_is("{}"), "cannot read"),
    "index with an empty map": (reindex(lambda m: m.clear()), "has no weight_map"),
    "index with a list": (index_is('{"weight_map":[]}'), "has no weight_map"),
    "index is a list": (index_is("[]"), "cannot read"),
    "index is no JSON": (index_is("{"), "cannot read"),
    "index is empty": (index_is(""), "cannot read"),
    "index is not UTF-8": (index_is(b'{"weight_map":{"\xff":"a.safetensors"}}'), "cannot read"),
    "index is deep": (index_is('{"weight_map":' + "[" * 100_000 + "]" * 100_000 + "}"), "cannot read"),
    "index is lost": (lambda model: (model / INDEX).unlink(), f"holds 2 .safetensors files and no {INDEX}"),
}  # fmt: skip


@pytest.mark.parametrize("case", DIRECTORIES)
def test_a_broken_directory_is_refused(case: str, shop: Path, tmp_path: Path) -> None:
    change, says = DIRECTORIES[case]
    shutil.copytree(shop / "sharded", tmp_path / "model")
    change(tmp_path / "model")
    assert_refused(tmp_path / "model", shop / "good.nest", says)


def test_a_directory_without_weights(shop: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert_refused(tmp_path / "model", shop / "good.nest", f"holds 0 .safetensors files and no {INDEX}")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.bin", "is not a model file in a format that nestpatch reads"),
        ("model.gguf", "the file ends inside its header"),
        ("x" * 300, "there is no model at"),
    ],
)
def test_a_path_that_is_no_model(name: str, says: str, shop: Path, tmp_path: Path) -> None:
    for taken in ("model.gguf", "model.bin"):
        (tmp_path / taken).write_bytes(b"GGUF")
    assert_refused(tmp_path / name, shop / "good.nest", says)


def test_a_path_without_a_file_is_a_missing_argument(shop: Path, tmp_path: Path) -> None:
    assert_refused(tmp_path / "nothing", shop / "good.nest", "there is no model at", "MissingInputError", 2)


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_the_sound_models_are_accepted(kind: str, shop: Path, tmp_path: Path) -> None:
    """Without this, the models above could be refused for a reason that has nothing to do with them."""
    checkpoint = open_checkpoint(shop / kind)
    assert len(checkpoint.tensors()) == 8
    result = CliRunner().invoke(main, ["apply", str(shop / kind), str(shop / "good.nest"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output


def test_a_file_that_shrinks_after_it_was_opened(shop: Path, tmp_path: Path) -> None:
    shutil.copytree(shop / "single", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    checkpoint = open_checkpoint(file)
    matrices = {name: stop for name, (_, shape, _, stop) in places(file).items() if len(shape) == 2}
    name = max(matrices, key=lambda name: matrices[name])
    os.truncate(file, matrices[name] - 1)
    rows = np.arange(checkpoint.info(name).rows)
    with pytest.raises(CheckpointFormatError, match=f"ends inside tensor {name}"):
        checkpoint.read_rows(name, rows)
    with pytest.raises(CheckpointFormatError, match=f"ends inside tensor {name}"):
        list(checkpoint.read_all(name))
