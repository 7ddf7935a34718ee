"""What may be in the place of a file: pipes, devices, folders, links, files without end, names that are none."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nestpatch.errors import FileSystemError, LedgerError
from nestpatch.files.locks import exclusive, lock, unlock
from nestpatch.files.reading import open_regular, read_bounded

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices of POSIX")


def made(kind: str, path: Path) -> Path:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    elif kind == "device":
        return Path("/dev/zero")
    return path


@pytest.mark.parametrize("kind", ["pipe", "directory", "socket", "device"])
@pytest.mark.parametrize("through", ["plainly", "through a link"])
def test_what_is_no_file_is_refused_by_its_kind_and_at_once(kind: str, through: str, tmp_path: Path) -> None:
    path = made(kind, tmp_path / "x")
    if through == "through a link":
        (tmp_path / "link").symlink_to(path)
        path = tmp_path / "link"
    with pytest.raises(OSError, match=f"it is a {kind}, not a file"):
        open_regular(path)
    with pytest.raises(OSError, match=f"it is a {kind}, not a file"):
        read_bounded(path, 10)
    with pytest.raises(LedgerError, match=f"cannot read .*: it is a {kind}, not a file"):
        read_bounded(path, 10, error=LedgerError)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "a/" * 3000])
def test_names_that_no_file_can_have_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(OSError):  # noqa: PT011 - the reasons are the system's own
        open_regular(tmp_path / name)
    with pytest.raises(FileSystemError, match="cannot read"):
        read_bounded(f"{tmp_path}/{name}", 10, error=FileSystemError)


def test_a_link_is_followed_only_where_that_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert read_bounded(tmp_path / "link", 10) == b"content"
    with pytest.raises(LedgerError, match="it is a symbolic link, not a file"):
        read_bounded(tmp_path / "link", 10, follow=False, error=LedgerError)
    assert read_bounded(tmp_path / "file", 10, follow=False) == b"content"


def test_a_link_that_replaces_the_file_between_the_looks_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses it, whatever was seen before."""
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **_: real(tmp_path / "file"))
    with pytest.raises(OSError, match="it is a symbolic link, not a file"):
        open_regular(tmp_path / "link", follow=False)


def test_a_pipe_that_replaces_the_file_between_the_looks_is_refused_and_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    os.mkfifo(tmp_path / "pipe")
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **_: real(tmp_path / "file"))
    before = len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0
    with pytest.raises(OSError, match="it is a pipe, not a file"):
        open_regular(tmp_path / "pipe")
    assert sys.platform != "linux" or len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_file_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(40 << 30)
    with pytest.raises(OSError, match="too long: at most 1000 bytes are allowed") as caught:
        read_bounded(tmp_path / "huge", 1000)
    assert caught.value.errno == errno.EFBIG
    (tmp_path / "just").write_bytes(bytes(1000))
    assert read_bounded(tmp_path / "just", 1000) == bytes(1000)
    with pytest.raises(OSError, match="too long: at most 999 bytes are allowed"):
        read_bounded(tmp_path / "just", 999)


@pytest.mark.skipif(sys.platform != "linux", reason="files of /proc")
def test_a_file_that_tells_no_size_is_read_to_the_limit_and_no_further() -> None:
    assert b"MemTotal" in read_bounded("/proc/meminfo", 1 << 20)
    with pytest.raises(OSError, match="too long: at most 10 bytes are allowed"):
        read_bounded("/proc/meminfo", 10)


def test_a_missing_file_stays_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "nothing", 10, error=LedgerError)
    (tmp_path / "dangling").symlink_to("nothing")
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "dangling", error=LedgerError)


def test_a_file_is_changed_where_writing_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with open_regular(tmp_path / "file", write=True) as file:
        file.write(b"C")
    assert (tmp_path / "file").read_bytes() == b"Content"
    with open_regular(tmp_path / "file") as file, pytest.raises(OSError, match="not open for writing"):
        file.write(b"c")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(FileSystemError, match="cannot lock") as caught, exclusive(tmp_path / "x.lock"):
        pass
    assert "NESTPATCH_HOME" in caught.value.advice


def test_a_lock_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileSystemError, match=r"cannot write .*missing"), exclusive(tmp_path / "missing" / "x.lock"):
        pass


def test_one_holds_the_lock_at_a_time(tmp_path: Path) -> None:
    """Processes that each add one to a number in a file, by reading and writing it."""
    (tmp_path / "number").write_text("0")
    code = """import sys
from pathlib import Path
from nestpatch.files.locks import exclusive
folder = Path(sys.argv[1])
for _ in range(50):
    with exclusive(folder / "lock"):
        number = int((folder / "number").read_text())
        (folder / "number").write_text(str(number + 1))"""
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    assert (tmp_path / "number").read_text() == "200"


def test_shared_locks_keep_out_an_exclusive_one_only(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with open(tmp_path / "lock", "r+b") as one, open(tmp_path / "lock", "r+b") as two, open(tmp_path / "lock", "r+b") as three:
        assert lock(one.fileno(), shared=True, wait=False)
        assert lock(two.fileno(), shared=True, wait=False)
        assert not lock(three.fileno(), wait=False)
        unlock(one.fileno())
        assert not lock(three.fileno(), wait=False)
        unlock(two.fileno())
        assert lock(three.fileno(), wait=False)
        assert not lock(one.fileno(), shared=True, wait=False)


def test_a_file_system_without_locks_is_not_a_lock_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / "lock").touch()
    with open(tmp_path / "lock", "r+b") as file:
        monkeypatch.setattr(fcntl, "flock", refuse)
        with pytest.raises(OSError, match="No locks available"):
            lock(file.fileno(), wait=False)
        unlock(file.fileno())
