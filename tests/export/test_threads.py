"""Exports with any number of threads: the same bytes; and what the disk does meanwhile."""

from __future__ import annotations

import errno
import os
from hashlib import sha256
from pathlib import Path

import pytest

from nestpatch.errors import OutputError, QuantizationError
from nestpatch.export import _gguf_tensors as tensors
from nestpatch.export._gguf_writer import write_gguf
from nestpatch.files.flushing import flushing
from nestpatch.files.hashing import Sink
from nestpatch.files.threads import limited
from nestpatch.formats import checkpoint as interface
from nestpatch.formats.opening import open_checkpoint
from tests.gguf.files import needs_llama

KINDS = ["f16", "f32", "q8_0", pytest.param("q4_k_m", marks=needs_llama)]


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_threads_gives_the_same_file(
    kind: str, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interface, "CHUNK", 20_000)  # several blocks a tensor
    monkeypatch.setattr(tensors, "_WORTHWHILE", 1)  # every row is worth a thread
    found = set()
    for threads in (1, 2, 5):
        with limited(threads):
            done = write_gguf(open_checkpoint(wide), tmp_path / f"{threads}.gguf", kind=kind, name="x")
        data = done.output.read_bytes()
        assert (len(data), sha256(data).hexdigest()) == (done.nbytes, done.sha256)
        found.add(done.sha256)
    assert len(found) == 1


def test_an_error_in_another_thread_is_raised_and_leaves_nothing(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise QuantizationError("this row")

    monkeypatch.setattr(tensors, "_WORTHWHILE", 1)
    monkeypatch.setattr(tensors, "_encoded", broken)
    with limited(3), pytest.raises(QuantizationError, match="this row"):
        write_gguf(open_checkpoint(wide), tmp_path / "out.gguf", kind="q8_0")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_kept_is_neither_hashed_nor_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("synced"))
    with Sink(tmp_path / "out", kept=False) as sink:
        sink.write(b"bytes")
    assert (tmp_path / "out").read_bytes() == b"bytes"
    assert sink.sha256 == sha256(b"").hexdigest()


def test_what_the_disk_refuses_meanwhile_is_told(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OSError, match="Input/output"), flushing() as flush:
        flush(tmp_path / "file")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="Input/output"):
        write_gguf(open_checkpoint(wide), tmp_path / "out" / "x.gguf", kind="q8_0")
    assert not list((tmp_path / "out").iterdir())
