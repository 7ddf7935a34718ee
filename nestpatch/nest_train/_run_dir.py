"""The run directory: what the stages of a training leave for the same training after an interruption, and for the next one.

Every file states its inputs, which are everything that its content depends on, and the SHA-256 of its content. A file of other
inputs counts as none, and so does a damaged one: a note says so, and the stage is done again. Files appear whole or not at all,
and contain JSON, safetensors or npy without objects, since anybody may have put them there.

Records are JSON Lines: a header, then one row per line. In a training by many processes the first one alone has a folder, and
what it finds there is sent to the others.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.atomic import new_place, remove, sync_tree, write_bytes
from nestpatch.files.reading import open_regular, read_bounded
from nestpatch.nest_train._digests import digest_array, digest_tensors, encode_json, require_digest
from nestpatch.nest_train._ranks import from_first, is_first
from nestpatch.nest_train._record import RunRecord
from nestpatch.rows import FloatArray

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
RECORD = "run.json"
"""The file that describes the run; it also marks a directory as one of runs."""
_MAX_ROWS = 256 << 20
"""Bytes of a record, at most: some hundred thousand answers."""
_MAX_FACTS = 64 << 20
"""Bytes of a file of tensors beside the tensors themselves, at most."""
_DAMAGE = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, struct.error)
"""What the content of a file can provoke while it is parsed."""


class RunDir:
    """The files of a run directory. Without a folder it keeps nothing and finds nothing.

    Attributes:
        folder: The directory; None where nothing is kept.
        context: Inputs of every file: the base and the arithmetic.
        record: Describes the run for people.
    """

    def __init__(self, folder: Path | None = None, on_event: OnEvent = ignore) -> None:
        self.folder = folder
        self.context: dict[str, Any] = {}
        self.record = RunRecord(folder / RECORD if folder else None)
        self._reused: list[str] = []
        self._on_event = on_event

    def note_reused(self, what: str) -> None:
        """Reports what an earlier training has left, and remembers it for the record of the run.

        Args:
            what: Such as "90 distilled answers".
        """
        self._reused.append(what)
        self.record.update({"reused": self._reused})
        self._note(f"reused: {what}")

    def note_damaged(self, name: str, error: BaseException) -> None:
        """Reports a file that cannot be used.

        Args:
            name: Its name without the ending.
            error: Why not.
        """
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        self._note(f"{name} of an earlier training not reused, the file is damaged: {reason}")

    def rows(self, name: str, inputs: Mapping[str, Any], parse: Callable[[Any], T]) -> list[T]:
        """Reads a record.

        Args:
            name: Its name without the ending.
            inputs: What its rows depend on beside the context.
            parse: Turns a JSON value into a row; raises ValueError, TypeError or LookupError for any other value.

        Returns:
            The rows; none where there is no record, where it is of other inputs, or where it is damaged.
        """
        return from_first(lambda: self._rows(name, inputs, parse))

    def _rows(self, name: str, inputs: Mapping[str, Any], parse: Callable[[Any], T]) -> list[T]:
        """`rows` of this process."""
        if self.folder is None:
            return []
        try:
            data = read_bounded(self.folder / f"{name}.jsonl", _MAX_ROWS, follow=False)
            head, _, body = data.partition(b"\n")
            if not self._fits(name, header := json.loads(head), inputs):
                return []
            require_digest(header["sha256"], sha256(body).hexdigest())
            return [parse(json.loads(line)) for line in body.split(b"\n")[:-1]]
        except FileNotFoundError:
            return []
        except _DAMAGE as error:
            self.note_damaged(name, error)
            return []

    def keep_rows(self, name: str, inputs: Mapping[str, Any], rows: Iterable[Any]) -> None:
        """Writes a record in the place of an older one.

        Args:
            name: Its name without the ending.
            inputs: As for `rows`.
            rows: JSON values.

        Raises:
            OutputError: It cannot be written.
        """
        if self.folder is not None:
            write_bytes(self.folder / f"{name}.jsonl", self._record(inputs, rows), overwrite=True)

    def value(self, name: str, inputs: Mapping[str, Any], make: Callable[[], T], parse: Callable[[Any], T]) -> T:
        """A single value that must stay what it was: found in its record, or made and recorded.

        Args:
            name: Name of the record without the ending.
            inputs: As for `rows`.
            make: Makes it.
            parse: As for `rows`.

        Returns:
            The value.
        """

        def found_or_made() -> T:
            if len(found := self._rows(name, inputs, parse)) == 1:
                return found[0]
            self.keep_rows(name, inputs, [made := make()])
            return made

        return from_first(found_or_made)

    def tensors(self, name: str, inputs: Mapping[str, Any], nbytes: int) -> tuple[Any, dict[str, torch.Tensor]] | None:
        """Reads a file of tensors.

        Args:
            name: Its name without the ending.
            inputs: As for `rows`.
            nbytes: Bytes that its tensors have at most.

        Returns:
            (facts, tensors) of `keep_tensors`; None as for `rows`.
        """
        return from_first(lambda: self._tensors(name, inputs, nbytes))

    def _tensors(self, name: str, inputs: Mapping[str, Any], nbytes: int) -> tuple[Any, dict[str, torch.Tensor]] | None:
        """`tensors` of this process."""
        if self.folder is None:
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            data = read_bounded(self.folder / f"{name}.safetensors", nbytes + _MAX_FACTS, follow=False)
            found = load(data)
            (length,) = struct.unpack_from("<Q", data)
            header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["nestpatch"])
            if not self._fits(name, header, inputs):
                return None
            require_digest(header["sha256"], digest_tensors(header["facts"], found))
            return header["facts"], found
        except FileNotFoundError:
            return None
        except (*_DAMAGE, SafetensorError) as error:
            self.note_damaged(name, error)
            return None

    def keep_tensors(self, name: str, inputs: Mapping[str, Any], facts: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes tensors and a JSON value in one file, in the place of an older one.

        Args:
            name: Its name without the ending.
            inputs: As for `rows`.
            facts: A JSON value.
            tensors: Of any type and on any device.

        Raises:
            OutputError: It cannot be written.
        """
        if self.folder is None:
            return
        from safetensors.torch import save

        here = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        header = {"inputs": {**self.context, **inputs}, "facts": facts, "sha256": digest_tensors(facts, here)}
        write_bytes(self.folder / f"{name}.safetensors", save(here, {"nestpatch": encode_json(header)}), overwrite=True)

    @contextmanager
    def arrays(
        self, name: str, inputs: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], make: Callable[[Path], Any]
    ) -> Iterator[Callable[[], list[FloatArray]]]:
        """A folder of float32 arrays, mapped into memory.

        Args:
            name: The folder's name.
            inputs: As for `rows`.
            shapes: Name of each file -> shape of its array.
            make: Writes the files into an empty folder.

        Yields:
            A function that returns the arrays, in the order of `shapes`; they are found or made when it is called. Of many
            processes all must call it, and the first one alone gets arrays.

        Raises:
            OutputError: The folder cannot be written.
        """
        if self.folder is None:
            # Windows cannot remove a file that is still mapped; the system's own cleaning removes it later.
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:

                def made() -> list[FloatArray]:
                    if from_first(lambda: False):  # another process has found them
                        return []
                    make(Path(temporary))
                    return [_mapped(Path(temporary) / file, shape) for file, shape in shapes.items()] if is_first() else []

                yield made
            return
        place = self.folder / name

        def kept() -> list[FloatArray]:
            found = self._kept_arrays(name, inputs, shapes)
            if from_first(lambda: bool(found)) and found:
                self.note_reused(f"{name} of {len(found)} blocks")
                return found
            remove(place)
            with new_place(place) as sibling:
                sibling.mkdir()
                make(sibling)
                digests = [digest_array(_mapped(sibling / file, shape)) for file, shape in shapes.items()]
                write_bytes(sibling / "files.jsonl", self._record(inputs, digests))
                sync_tree(sibling)
            return [_mapped(place / file, shape) for file, shape in shapes.items()]

        yield kept

    def _kept_arrays(
        self, name: str, inputs: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]
    ) -> list[FloatArray] | None:
        digests = self._rows(f"{name}/files", inputs, _text)
        if not digests or self.folder is None:
            return None
        try:
            found = [_mapped(self.folder / name / file, shape) for file, shape in shapes.items()]
            for array, digest in zip(found, digests, strict=True):
                require_digest(digest, digest_array(array, finite=True))
        except _DAMAGE as error:
            self.note_damaged(name, error)
            return None
        return found

    def wrote(self, output: Path, inputs: Mapping[str, Any]) -> bool:
        """Whether a file is a pack that the same training wrote, so that it may replace it.

        Args:
            output: The file.
            inputs: As for `keep_written`.

        Returns:
            False also for a file that cannot be read.
        """
        from nestpatch.errors import PackError
        from nestpatch.formats.nest import read_bytes

        try:
            return sha256(read_bytes(output)).hexdigest() in self._rows("written", inputs, _text)
        except PackError:
            return False

    def keep_written(self, digest: str, inputs: Mapping[str, Any]) -> None:
        """Records, before it is written, a pack that the training writes.

        Args:
            digest: SHA-256 of its file.
            inputs: What makes it the same training.
        """
        self.keep_rows("written", inputs, dict.fromkeys([*self._rows("written", inputs, _text), digest]))

    def _record(self, inputs: Mapping[str, Any], rows: Iterable[Any]) -> bytes:
        body = b"".join(encode_json(row).encode() + b"\n" for row in rows)
        header = {"inputs": {**self.context, **inputs}, "sha256": sha256(body).hexdigest()}
        return encode_json(header).encode() + b"\n" + body

    def _fits(self, name: str, header: Any, inputs: Mapping[str, Any]) -> bool:
        """Whether a file has these inputs; a note says which ones differ."""
        wanted, found = json.loads(encode_json({**self.context, **inputs})), header["inputs"]
        if found == wanted:
            return True
        differ = sorted(key for key in {*wanted, *found} if found.get(key) != wanted.get(key))
        self._note(f"{name} of an earlier training not reused: another {', '.join(differ)}")
        return False

    def _note(self, text: str) -> None:
        self._on_event(Event("note", note=text))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("it is not a text")
    return value


def _mapped(path: Path, shape: tuple[int, int]) -> FloatArray:
    """A float32 array in a file; raises ValueError or OSError for anything else there."""
    with open_regular(path, follow=False):
        array = np.lib.format.open_memmap(path, mode="r")
    if array.shape != shape or array.dtype != np.float32:
        raise ValueError(f"an array {array.shape} of {array.dtype} in the place of {shape} of float32")
    return np.asarray(array)
