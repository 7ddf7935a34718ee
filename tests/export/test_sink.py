"""The file that is written and hashed at once."""

from __future__ import annotations

import errno
import os
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from nestpatch.errors import CheckpointFormatError
from nestpatch.files import flushing, hashing
from nestpatch.files.hashing import Sink, seal

DATA = np.random.default_rng(0).integers(0, 256, 3_300_017, np.uint8).tobytes()


@pytest.mark.parametrize("kernel", ["kernel", "buffer", "absent"])
def test_bytes_size_and_digest(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> int:
        raise OSError(errno.EXDEV, "no copy between these files")

    if kernel == "buffer":
        monkeypatch.setattr(os, "copy_file_range", unsupported, raising=False)
    elif kernel == "absent":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    (tmp_path / "source").write_bytes(DATA)
    with Sink(tmp_path / "out") as sink:
        sink.write(b"head")
        sink.copy(tmp_path / "source", 1000, 2_500_001)
        sink.write(memoryview(DATA)[:5])
        sink.copy(tmp_path / "source", 7, 9)
    want = b"head" + DATA[1000 : 1000 + 2_500_001] + DATA[:5] + DATA[7:16]
    assert (tmp_path / "out").read_bytes() == want
    assert (sink.nbytes, sink.sha256) == (len(want), sha256(want).hexdigest())
    assert seal(tmp_path / "out") == (len(want), sha256(want).hexdigest())


def test_the_disk_begins_to_write_before_the_file_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, sync = [], flushing.sync_file

    def watched(path: Path) -> None:
        synced.append(path)
        sync(path)

    monkeypatch.setattr(hashing, "STRETCH", 1 << 20)
    monkeypatch.setattr(flushing, "sync_file", watched)
    with Sink(tmp_path / "out") as sink:
        for start in range(0, len(DATA), 100_000):
            sink.write(DATA[start : start + 100_000])
    assert set(synced) == {tmp_path / "out"}
    assert 1 <= len(synced) <= len(DATA) >> 20
    assert (sink.nbytes, sink.sha256) == (len(DATA), sha256(DATA).hexdigest())
    assert (tmp_path / "out").read_bytes() == DATA


@pytest.mark.parametrize("stopped", [False, True])
def test_a_disk_that_fails_meanwhile_is_told_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool) -> None:
    """Unless the block raised an error of its own."""

    def broken(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(hashing, "STRETCH", 1000)
    monkeypatch.setattr(flushing, "sync_file", broken)

    def write() -> None:
        with Sink(tmp_path / "out") as sink:
            sink.write(DATA[:2000])
            if stopped:
                raise ValueError("stopped")

    with pytest.raises(ValueError if stopped else OSError, match="stopped" if stopped else "Input/output error"):
        write()


def test_an_empty_file(tmp_path: Path) -> None:
    with Sink(tmp_path / "out") as sink:
        pass
    assert (sink.nbytes, sink.sha256) == (0, sha256(b"").hexdigest())


def test_a_source_that_ends_is_named(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(DATA[:100])
    with pytest.raises(CheckpointFormatError, match="source ends too early"), Sink(tmp_path / "out") as sink:
        sink.copy(tmp_path / "source", 90, 20)


def test_a_full_disk_is_no_reason_to_try_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full, raising=False)
    (tmp_path / "source").write_bytes(DATA[:100])
    with pytest.raises(OSError, match="No space left"), Sink(tmp_path / "out") as sink:
        sink.copy(tmp_path / "source", 0, 100)
    assert not (tmp_path / "out").read_bytes()


def test_a_file_cut_off_by_another_is_told(tmp_path: Path) -> None:
    sink = Sink(tmp_path / "out")
    sink.__enter__()
    sink.write(DATA[:100])
    os.truncate(tmp_path / "out", 10)
    with pytest.raises(OSError, match="was truncated"):
        sink.__exit__(None, None, None)
