"""Files that are read to a limit, and pipes and devices in their places: refused by name, without waiting."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nestpatch import export_gguf
from nestpatch.errors import (
    CheckpointFormatError,
    KeyFileError,
    NestpatchError,
    PackContentError,
    PackError,
    PackFormatError,
    PromptDataError,
    RecipeError,
    SignatureFormatError,
    TrustError,
)
from nestpatch.formats import nest, safetensors
from nestpatch.formats.opening import open_checkpoint
from nestpatch.formats.safetensors import INDEX
from nestpatch.nest_train.recipe import make_recipe
from nestpatch.pack import version_problem
from nestpatch.prompts.readers import load_prompts
from nestpatch.signing.keys import PublicKey, read_private
from nestpatch.signing.store import load_policy
from nestpatch.signing.verify import read_signatures
from tests.attacks.tools import split
from tests.export.families import model_around
from tests.export.tokenizers_made import byte_level
from tests.helpers import tiny_checkpoint, tiny_pack

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices of POSIX")


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    nest.write(tiny_pack(tiny_checkpoint(tmp_path / "model")), tmp_path / "x.nest")
    return tmp_path / "x.nest"


def grown(path: Path, size: int) -> Path:
    """The file with zeros after it, which take no room on the disk."""
    with path.open("ab") as file:
        file.truncate(size)
    return path


def with_pipe(path: Path) -> Path:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def test_a_pack_of_40_gigabytes_is_refused_by_what_its_header_says(pack: Path) -> None:
    """Nothing after the header is read: this would fill the memory."""
    size = 40 << 30
    with pytest.raises(PackFormatError, match=r"x.nest: the header describes .* the file holds"):
        nest.read(grown(pack, size))
    with pytest.raises(PackFormatError, match=r"x.nest: the header describes"):
        nest.read_bytes(pack)


def test_a_pack_whose_header_describes_40_gigabytes_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"a:delta": {"dtype": "F32", "shape": [10 << 30], "data_offsets": [0, 40 << 30]}}).encode()
    (tmp_path / "x.nest").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(PackFormatError, match="1073741824 are allowed"):
        nest.read(grown(tmp_path / "x.nest", 8 + len(header) + (40 << 30)))


def test_a_pack_that_could_not_be_read_is_not_written(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = nest.read(pack)
    monkeypatch.setattr(nest, "MAX_PACK", pack.stat().st_size - 1)
    with pytest.raises(PackContentError, match="the pack would have"):
        nest.encode(content)
    with pytest.raises(PackFormatError, match="are allowed"):
        nest.read(pack)
    monkeypatch.setattr(nest, "MAX_PACK", pack.stat().st_size)
    assert nest.encode(nest.read(pack)) == pack.read_bytes()


@pytest.mark.parametrize("version", ["9" * 5000 + ".0.0", "1.0.0-" + "1" * 59, "1.0.0+" + "a" * 59])
def test_a_version_of_thousands_of_digits_is_none(version: str) -> None:
    assert "64 are allowed" in (version_problem(version) or "")
    assert version_problem("9" * 60 + ".0.0" if version[0] == "9" else version[:64]) is None


def test_a_header_of_tens_of_megabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 76 << 20))
    with pytest.raises(CheckpointFormatError, match="79691776 bytes; 16777216 are allowed, room for 100,000 tensors") as caught:
        open_checkpoint(grown(path, 80 << 20))
    assert "several files" in caught.value.advice


def test_a_header_of_a_hundred_thousand_tensors_is_within_the_limit() -> None:
    """Names and offsets as long as those of the largest mixtures of experts."""
    entry = {"dtype": "F8_E4M3", "shape": [7168, 2048], "data_offsets": [999_999_999_999, 999_999_999_999]}
    one = json.dumps({"model.layers.60.mlp.experts.383.gate_proj.weight": entry}, separators=(",", ":"))
    assert len(one) * 100_000 < safetensors.MAX_HEADER


def test_an_index_of_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", sharded=True)
    grown(model / INDEX, 4 << 30)
    with pytest.raises(CheckpointFormatError, match="it is too long: at most 67108864 bytes are allowed"):
        open_checkpoint(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("what", ["a pipe", "gigabytes", "a directory"])
def test_odd_files_in_a_model_are_refused_before_anything_is_written(name: str, what: str, tmp_path: Path) -> None:
    model = model_around(tmp_path / "model")
    byte_level(model, "gpt2")
    (model / name).unlink(missing_ok=True)
    if what == "a directory":
        (model / name).mkdir()
    elif what == "a pipe":
        os.mkfifo(model / name)
    else:
        (model / name).write_text("{}")
        grown(model / name, 4 << 30)
    with pytest.raises(CheckpointFormatError, match=f"{name}: it is (a pipe|a directory|too long)"):
        export_gguf(model, output=tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("name", ["x.safetensors", "x.gguf", "x.onnx"])
@pytest.mark.parametrize("what", ["a pipe", "a device"])
def test_a_model_that_is_no_file_is_refused_by_its_kind(name: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with_pipe(path) if what == "a pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointFormatError, match=f"it is {what}, not a file"):
        open_checkpoint(path)


READERS: dict[str, tuple[Callable[[Path], object], type[NestpatchError]]] = {
    "x.nest": (nest.read, PackError),
    "x.key": (read_private, KeyFileError),
    "x.pub": (PublicKey.read, KeyFileError),
    "policy.json": (load_policy, TrustError),
    "x.jsonl": (load_prompts, PromptDataError),
    "x.json": (load_prompts, PromptDataError),
    "x.csv": (load_prompts, PromptDataError),
    "x.txt": (load_prompts, PromptDataError),
    "x.parquet": (load_prompts, PromptDataError),
    "x.toml": (make_recipe, RecipeError),
    "x.nest.sig": (lambda path: read_signatures(path.with_suffix("")), SignatureFormatError),
}


@pytest.mark.parametrize("what", ["a pipe", "a device", "a directory"])
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_none_is_refused_by_its_kind_and_at_once(name: str, what: str, tmp_path: Path) -> None:
    read, error = READERS[name]
    path = tmp_path / name
    if what == "a pipe":
        os.mkfifo(path)
    elif what == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(error, match=f"it is {what}, not a file"):
        read(path)


@pytest.mark.parametrize("name", [name for name in READERS if name not in ("x.nest", "x.parquet")])
def test_a_file_of_terabytes_is_refused_unread(name: str, tmp_path: Path) -> None:
    read, error = READERS[name]
    (tmp_path / name).write_bytes(b"")
    grown(tmp_path / name, 1 << 42)
    with pytest.raises(error, match="it is too long"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.json", "[" * 100_000),
        ("x.jsonl", "[" * 100_000),
        ("x.json", '[{"prompt": ' + "9" * 5000 + "}]"),
        ("x.json", r'["\ud800"]'),
        ("x.json", r'[{"prompt": "a", "answer": "\udfff"}]'),
        ("x.csv", 'prompt\n"open'),
        ("x.txt", "\0"[:0]),
    ],
)
def test_odd_prompts_are_refused_by_name(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(PromptDataError):
        load_prompts(tmp_path / name)


def test_a_slice_of_thousands_of_digits_is_no_slice(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a\nb\n")
    assert len(load_prompts(f"{tmp_path}/x.txt[:1]").prompts) == 1
    with pytest.raises(PromptDataError):
        load_prompts(f"{tmp_path}/x.txt[:{'9' * 5000}]")


@pytest.mark.parametrize("content", ["steps = " + "9" * 5000, "clip = 0x1" + "0" * 400, "a = " + "[" * 100_000, "\xff"])
def test_odd_recipes_are_refused_by_name(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(content.encode("latin-1"))
    with pytest.raises(RecipeError):
        make_recipe(tmp_path / "x.toml")


def test_a_table_that_unpacks_to_gigabytes_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from nestpatch.prompts import readers as data

    parquet.write_table(pyarrow.table({"prompt": ["the same"] * 1000}), tmp_path / "x.parquet")
    assert len(load_prompts(tmp_path / "x.parquet").prompts) == 1
    monkeypatch.setattr(data, "MAX_TABLE", 10)
    with pytest.raises(PromptDataError, match=r"unpacks to .* bytes; 10 are allowed"):
        load_prompts(tmp_path / "x.parquet")


def test_the_honest_pack_is_still_read(pack: Path) -> None:
    """The header parsed twice, and the bytes read in parts, give the file."""
    assert nest.read_bytes(pack) == pack.read_bytes()
    assert split(nest.read_bytes(pack))[0].startswith("{")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"])
@pytest.mark.parametrize("what", ["a pipe", "too long"])
def test_a_model_that_transformers_would_read_whole_is_looked_at_first(name: str, what: str, tmp_path: Path) -> None:
    from nestpatch.runtimes.loading import _require_bounded

    model = tiny_checkpoint(tmp_path / "model")
    _require_bounded(model)
    (model / name).unlink(missing_ok=True)
    if what == "a pipe":
        os.mkfifo(model / name)
    else:
        (model / name).write_text("{}")
        grown(model / name, 4 << 30)
    with pytest.raises(CheckpointFormatError, match=rf"{name}.*(it is a pipe|4294967296 bytes)"):
        _require_bounded(model)
