"""Hostile GGUF files: each is refused with an error that names the fault, before a row is read; the model stays as it is."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from nestpatch.cli import main
from nestpatch.errors import CheckpointFormatError, NestpatchError
from nestpatch.formats import nest
from nestpatch.formats.gguf.header import read_header
from nestpatch.formats.opening import open_checkpoint
from tests.gguf.files import gguf_of, places
from tests.helpers import PROPERTY, tiny_checkpoint, tiny_pack


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def number(key: str, value: int) -> bytes:
    """A key with an unsigned 32-bit value."""
    return text(key) + struct.pack("<II", 4, value)


def value(key: str, kind: int, content: bytes) -> bytes:
    """A key with a value of any type."""
    return text(key) + struct.pack("<I", kind) + content


def tensor(name: str, shape: tuple[int, ...], code: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, code, offset)


def file_bytes(
    *, entries: list[bytes] | None = None, tensors: list[bytes] | None = None, body: int = 4096, counts=None
) -> bytes:
    """A GGUF file put together by hand: one F32 matrix of 16 x 32 in a body of 2048 bytes by default."""
    entries = [text("general.architecture") + struct.pack("<I", 8) + text("llama")] if entries is None else entries
    tensors = [tensor("a", (32, 16), 0, 0), tensor("b", (32, 16), 0, 2048)] if tensors is None else tensors
    head = b"GGUF" + struct.pack("<I2Q", 3, *(counts or (len(tensors), len(entries)))) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(body)


def test_the_honest_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(file_bytes())
    header = read_header(tmp_path / "m.gguf")
    assert {name: (info.dtype, info.shape, info.nbytes) for name, info in header.tensors.items()} == {
        "a": ("F32", (16, 32), 2048),
        "b": ("F32", (16, 32), 2048),
    }
    assert header.metadata == {"general.architecture": "llama"}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_places_are_those_of_the_gguf_package(kind: str, tmp_path: Path) -> None:
    path = gguf_of(tiny_checkpoint(tmp_path / "base", hidden=64, inter=96), tmp_path / "m.gguf", kind)
    ours = {name: (i.dtype, i.offset, i.nbytes // i.rows, i.rows) for name, i in read_header(path).tensors.items()}
    assert ours == places(path)


ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is not a GGUF file"),
    "another magic": (lambda: b"GGML" + file_bytes()[4:], "is not a GGUF file"),
    "version 1": (lambda: b"GGUF" + struct.pack("<I", 1) + file_bytes()[8:], "has GGUF version 1"),
    "version 4": (lambda: b"GGUF" + struct.pack("<I", 4) + file_bytes()[8:], "has GGUF version 4"),
    "big-endian": (lambda: b"GGUF" + struct.pack(">I", 3) + file_bytes()[8:], "big-endian"),
    "tensors without end": (lambda: file_bytes(counts=(1 << 60, 1)), "do not fit"),
    "entries without end": (lambda: file_bytes(counts=(2, 1 << 60)), "do not fit"),
    "one entry more than there is": (lambda: file_bytes(counts=(2, 2)), "broken"),
    "a key of terabytes": (lambda: file_bytes(entries=[struct.pack("<Q", 1 << 40)]), "claims 1099511627776 bytes"),
    "a key that is no text": (
        lambda: file_bytes(entries=[struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1)]),
        "broken",
    ),
    "a key twice": (lambda: file_bytes(entries=[number("x", 1), number("x", 2)]), "duplicate key 'x'"),
    "a value of unknown type": (lambda: file_bytes(entries=[text("x") + struct.pack("<II", 77, 1)]), "unknown type 77"),
    "an array of petabytes": (lambda: file_bytes(entries=[text("x") + struct.pack("<IIQ", 9, 10, 1 << 50)]), "an array claims"),
    "a long array of strings": (lambda: file_bytes(entries=[text("x") + struct.pack("<IIQ", 9, 8, 4000)]), "broken"),
    "arrays in arrays in arrays": (
        lambda: file_bytes(entries=[text("x") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50]),
        "an array claims",
    ),
    "more arrays in an array than anybody needs": (
        lambda: file_bytes(entries=[text("x") + struct.pack("<IIQ", 9, 9, 70_000) + bytes(12 * 70_000)]),
        "an array claims",
    ),
    "a string of an exabyte": (
        lambda: file_bytes(entries=[text("x") + struct.pack("<IQ", 8, 1 << 60)]),
        "a string claims 1152921504606846976 bytes",
    ),
    "more tensors than anybody needs": (lambda: file_bytes(counts=(70_000, 1), body=2 << 20), "70000 tensors and 1 entries"),
    "more keys than anybody needs": (lambda: file_bytes(counts=(2, 70_000), body=2 << 20), "2 tensors and 70000 entries"),
    "parts that are no number": (
        lambda: file_bytes(entries=[value("split.count", 8, text("abc"))]),
        "has 'abc' for split.count",
    ),
    "parts that are NaN": (
        lambda: file_bytes(entries=[value("split.count", 6, struct.pack("<f", math.nan))]),
        "has 'nan' for split.count",
    ),
    "parts without end": (
        lambda: file_bytes(entries=[value("split.count", 12, struct.pack("<d", math.inf))]),
        "has 'inf' for split.count",
    ),
    "alignment as text": (
        lambda: file_bytes(entries=[value("general.alignment", 8, text("32"))]),
        "general.alignment is '32'",
    ),
    "alignment beyond the file": (
        lambda: file_bytes(entries=[value("general.alignment", 10, struct.pack("<Q", 1 << 62))]),
        "broken",
    ),
    "alignment zero": (lambda: file_bytes(entries=[number("general.alignment", 0)]), "general.alignment is 0"),
    "alignment seven": (lambda: file_bytes(entries=[number("general.alignment", 7)]), "general.alignment is 7"),
    "no dimensions": (lambda: file_bytes(tensors=[text("a") + struct.pack("<IIQ", 0, 0, 0)]), "has 0 dimensions"),
    "nine dimensions": (lambda: file_bytes(tensors=[tensor("a", (1,) * 9, 0, 0)]), "has 9 dimensions"),
    "an empty tensor": (lambda: file_bytes(tensors=[tensor("a", (32, 0), 0, 0)], body=0), "impossible shape"),
    "a shape that overflows": (lambda: file_bytes(tensors=[tensor("a", (1 << 40, 1 << 40), 0, 0)]), "impossible shape"),
    "half a block": (lambda: file_bytes(tensors=[tensor("a", (33, 16), 8, 0)]), "do not fit into Q8_0"),
    "an unknown tensor type": (lambda: file_bytes(tensors=[tensor("a", (32, 16), 999, 0)]), "unknown type 999"),
    "a tensor twice": (lambda: file_bytes(tensors=[tensor("a", (32, 16), 0, 0)] * 2), "duplicate tensor 'a'"),
    "tensors that overlap": (
        lambda: file_bytes(tensors=[tensor("a", (32, 16), 0, 0), tensor("b", (32, 16), 0, 1024)]),
        "overlaps the one before",
    ),
    "a gap": (lambda: file_bytes(tensors=[tensor("a", (32, 16), 0, 0), tensor("b", (32, 8), 0, 3072)]), "leaves a gap"),
    "an offset beyond the file": (lambda: file_bytes(tensors=[tensor("a", (32, 16), 0, 1 << 40)]), "leaves a gap"),
    "truncated": (lambda: file_bytes(body=4000), "truncated inside tensor 'b'"),
    "longer": (lambda: file_bytes(body=8192), "longer than its header says"),
}


LAYERS: dict[str, tuple[bytes, str]] = {
    "millions": (number("llama.block_count", 5_000_000), "a model of 5000000 layers"),
    "text": (text("llama.block_count") + struct.pack("<I", 8) + text("abc"), "has 'abc' for llama.block_count"),
    "NaN": (text("llama.block_count") + struct.pack("<If", 6, math.nan), "has 'nan' for llama.block_count"),
    "fewer than none": (text("llama.block_count") + struct.pack("<Ii", 5, -7), "a model of -7 layers"),
    "true": (text("llama.block_count") + struct.pack("<IB", 7, 1), "has 'True' for llama.block_count"),
}


@pytest.mark.parametrize("attack", LAYERS)
def test_a_number_of_layers_that_no_model_has_is_refused_before_their_names_are_made(attack: str, tmp_path: Path) -> None:
    layers, says = LAYERS[attack]
    path = tmp_path / "m.gguf"
    path.write_bytes(file_bytes(entries=[value("general.architecture", 8, text("llama")), layers]))
    with pytest.raises(NestpatchError, match=says):
        open_checkpoint(path).has("model.layers.0.mlp.gate_proj.weight")
    nest.write(tiny_pack(tiny_checkpoint(tmp_path / "base")), tmp_path / "x.nest")
    result = CliRunner().invoke(main, ["verify", str(path), str(tmp_path / "x.nest")])
    assert (result.exit_code, type(result.exception)) == (1, SystemExit), result.exception


def test_a_sparse_file_of_terabytes_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I2Q", 3, 0, 1) + text("x") + struct.pack("<IIQ", 9, 8, 1 << 35))
    with path.open("r+b") as file:
        file.truncate(1 << 42)
    with pytest.raises(CheckpointFormatError, match="the header is longer than"):
        open_checkpoint(path)


@pytest.mark.parametrize("attack", ATTACKS)
def test_lies_are_refused_by_name(attack: str, tmp_path: Path) -> None:
    make, says = ATTACKS[attack]
    path = tmp_path / "m.gguf"
    path.write_bytes(make())
    with pytest.raises(CheckpointFormatError, match=says.replace("(", r"\(")) as caught:
        open_checkpoint(path)
    assert caught.value.advice
    result = CliRunner().invoke(main, ["verify", str(path)])
    assert (result.exit_code, type(result.exception)) == (1, SystemExit), result.exception
    assert path.read_bytes() == make()


@PROPERTY
@given(data=st.data())
def test_any_damage_is_an_error_or_no_damage(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever happens to the header: it opens, or it is refused by name."""
    whole = bytearray(file_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 200))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(whole))))
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    path.write_bytes(bytes(whole[:cut]))
    try:
        header = read_header(path)
    except CheckpointFormatError:
        return
    size = path.stat().st_size
    assert all(info.offset + info.nbytes <= size for info in header.tensors.values())
