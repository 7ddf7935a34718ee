"""Opens and reads files of unknown origin, without trusting what they are.

A path given to nestpatch may name a pipe without a writer, a device without end, a folder, a link, or a file of terabytes.
`open_regular` opens regular files only; `read_bounded` reads no more than the caller allows; `read_text` and `read_json` parse
what it read. None of them blocks.

They raise OSError, whose `strerror` is a full sentence. With `error` they raise that class instead, with the path and the
reason; a missing file stays FileNotFoundError:

    try:
        data = read_bounded(path, MAX_LEDGER, follow=False, error=LedgerError)
    except FileNotFoundError:
        return Ledger()
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any, NoReturn

from nestpatch.errors import CheckpointFormatError, NestpatchError

BLOCK = 1 << 20
"""Bytes read at a time, so that a limit costs no memory that the file does not fill."""
MAX_JSON = 64 << 20
"""Bytes of a JSON file in a model's folder. The largest are vocabularies: the tokenizer.json of Gemma 3 has 33 MB."""
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link",
}
# Windows lacks all of them but O_BINARY.
_SAFELY = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def open_regular(
    path: str | Path, *, follow: bool = True, write: bool = False, error: type[NestpatchError] | None = None
) -> FileIO:
    """Opens a regular file, unbuffered. Never creates or truncates one.

    Args:
        path: The file.
        follow: Whether the last part of the path may be a symbolic link; False for files that nestpatch itself keeps.
        write: Whether to open it for writing too.
        error: The class to raise in place of OSError.

    Returns:
        The open file, positioned at its start.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It is not a regular file, may not be read, or its name is impossible; `strerror` is the reason.
        NestpatchError: Of the class `error`, in place of OSError.
    """
    with _raising(error, "change" if write else "read", path):
        try:
            status = os.stat(path, follow_symlinks=follow)  # noqa: PTH116 - links as the caller has it
        except ValueError:  # what no system call takes: a NUL, or characters that file names cannot hold
            _refuse(errno.EINVAL, "no file can have this name", path)
        # Before it is opened: opening a device may do something.
        _require_regular(status, path)
        flags = (os.O_RDWR if write else os.O_RDONLY) | _SAFELY | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
        try:
            handle = os.open(path, flags)
        except OSError as refused:
            if refused.errno == errno.ELOOP and not follow:
                _refuse(errno.ELOOP, "it is a symbolic link, not a file", path)
            raise
        try:
            # And again: another process may have replaced it in between.
            _require_regular(os.fstat(handle), path)
            return os.fdopen(handle, "r+b" if write else "rb", buffering=0)
        except BaseException:  # closed whatever happens, Ctrl-C included
            os.close(handle)
            raise


def read_bounded(path: str | Path, limit: int, *, follow: bool = True, error: type[NestpatchError] | None = None) -> bytes:
    """Reads a regular file whole.

    Args:
        path: The file.
        limit: Bytes that it may have; nothing of a longer one is read.
        follow: As in `open_regular`.
        error: As in `open_regular`.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: As in `open_regular`, or the file is longer than `limit`.
        NestpatchError: Of the class `error`, in place of OSError.
    """
    with _raising(error, "read", path), open_regular(path, follow=follow) as file:
        return read_open(file, limit, path)


def read_text(path: str | Path, limit: int, *, error: type[NestpatchError] | None = None) -> str:
    """Reads a regular file as UTF-8 text with line feeds as line ends.

    Args:
        path: The file.
        limit: Bytes that it may have.
        error: As in `open_regular`.

    Returns:
        The text.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: As in `read_bounded`.
        UnicodeDecodeError: It is not UTF-8.
        NestpatchError: Of the class `error`, in place of OSError and UnicodeDecodeError.
    """
    data = read_bounded(path, limit, error=error)
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as refused:
        if error is None:
            raise
        raise error(f"cannot read {path}: {refused}") from refused


def read_open(file: FileIO, limit: int, path: str | Path) -> bytes:
    """Reads an open file to its end.

    Args:
        file: The file.
        limit: Bytes that it may have.
        path: Its path, for messages.

    Returns:
        Its content.

    Raises:
        OSError: It is longer than `limit`.
    """
    too_long = f"it is too long: at most {limit} bytes are allowed"
    if os.fstat(file.fileno()).st_size > limit:
        _refuse(errno.EFBIG, too_long, path)
    # Not a list of blocks: joining them would hold the content twice.
    content, left = BytesIO(), limit
    # The size is no promise: files of /proc have none, and others grow.
    while block := file.read(min(BLOCK, left + 1)):
        left -= len(block)
        if left < 0:
            _refuse(errno.EFBIG, too_long, path)
        content.write(block)
    return content.getvalue()


def read_json(path: Path, *, missing: Any = None) -> Any:
    """Reads a JSON file in a model's folder.

    Args:
        path: The file.
        missing: What to return where there is no file.

    Returns:
        Its value.

    Raises:
        CheckpointFormatError: It cannot be read, is longer than MAX_JSON, or is not JSON.
    """
    try:
        return json.loads(read_text(path, MAX_JSON, error=CheckpointFormatError))
    except FileNotFoundError:
        return missing
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"cannot read {path}: {error}") from error


@contextmanager
def _raising(error: type[NestpatchError] | None, verb: str, path: str | Path) -> Iterator[None]:
    """Turns an OSError other than FileNotFoundError into a class of the caller's choice."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as refused:
        if error is None:
            raise
        raise error(f"cannot {verb} {path}: {refused.strerror or refused}") from refused


def _require_regular(found: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        _refuse(errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL, f"it is {kind}, not a file", path)


def _refuse(number: int, reason: str, path: str | Path) -> NoReturn:
    raise OSError(number, reason, os.fspath(path))
