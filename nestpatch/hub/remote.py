"""A safetensors model on the Hub as a read-only checkpoint: headers first, then only the rows that are needed.

A pack for a model with billions of parameters touches megabytes of it, and only these are downloaded from its base. The commit
is fixed when the checkpoint is opened: a branch that moves while rows are read changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from nestpatch.errors import CheckpointFormatError, HubUnavailableError, InPlaceError
from nestpatch.formats.checkpoint import Checkpoint, IntArray, TensorInfo
from nestpatch.formats.opening import open_checkpoint
from nestpatch.formats.safetensors import (
    INDEX,
    MAX_INDEX,
    SINGLE,
    Headers,
    SafetensorsCheckpoint,
    header_length,
    parse_header,
    parse_index,
    row_dtype,
)
from nestpatch.hub.client import SCHEME, Reference, Snapshot, look_up, looks_local
from nestpatch.hub.ranges import Meter, RemoteFile
from nestpatch.rows import Rows

_PARALLEL = 8
"""Requests at a time."""
_GAP = 256 << 10
"""Bytes between two wanted rows that are read along rather than skipped. Skipping them costs another request: with a round
trip of 100 ms to a CDN and _PARALLEL requests at a time an eighth of that, in which 20 MB/s bring 250 kB. On such a
connection, simulated, 1 % and 3 % of 8 kB rows took 4.7 and 8.4 s; with no gap 5.8 and 16.6 s, with 1 MiB 7.4 and 16.3."""
_PART = 8 << 20
"""Bytes of one request at most, unless a single row is larger."""
_KEPT = 256 << 20
"""Bytes of rows kept in memory: applying a pack reads its rows twice, to identify the base and to compute the result."""
_FIRST = 100 << 10
"""Bytes of the first request for a header. Nearly all headers are shorter, and then one request is enough."""
_LANDMARKS = (INDEX, SINGLE, "config.json", "README.md", ".gitattributes")
"""Files by which a cached snapshot is found: nearly every model repository has one of them."""


@dataclass(frozen=True)
class _ByteRange:
    """One request: the rows at positions [first, last) of a list, which are bytes [start, stop) of the tensor."""

    first: int
    last: int
    start: int
    stop: int


def _byte_ranges(rows: IntArray, row_bytes: int, *, gap: int = _GAP, limit: int = _PART) -> list[_ByteRange]:
    """The requests that fetch sorted rows: one for those at most `gap` bytes apart, none over `limit` except for one row."""
    found: list[_ByteRange] = []
    for position, row in enumerate(rows.tolist()):
        start, stop = row * row_bytes, (row + 1) * row_bytes
        last = found[-1] if found else None
        if last is not None and start - last.stop <= gap and stop - last.start <= limit:
            found[-1] = _ByteRange(last.first, position + 1, last.start, stop)
        else:
            found.append(_ByteRange(position, position + 1, start, stop))
    return found


class RemoteCheckpoint(Headers, Checkpoint):
    """The reading half of a checkpoint, over HTTP. Writing is refused.

    Args:
        snapshot: The commit to read.
        endpoint: Address of the Hub; None: that of HF_ENDPOINT.

    Raises:
        HubError: The Hub does not deliver the headers.
        CheckpointFormatError: The repository does not contain a sound safetensors model.
    """

    def __init__(self, snapshot: Snapshot, *, endpoint: str | None = None) -> None:
        self.snapshot = snapshot
        self.path = Path(str(snapshot))
        """For messages: nothing is stored on this disk."""
        self.meter = Meter()
        """Counts what was received so far."""
        self._endpoint = endpoint
        self._kept: dict[tuple[str, bytes], Rows] = {}
        self._lock = Lock()
        names, index = self._find_files()
        self.files = tuple(self.path / name for name in names)
        self._remote = {self.path / name: self._open(name) for name in names}
        with ThreadPoolExecutor(_PARALLEL) as pool:
            super().__init__(self.path, pool.map(self._read_header, self.files), index)
        self.size = sum(file.size or 0 for file in self._remote.values())
        """Bytes of all weight files."""

    def _open(self, name: str) -> RemoteFile:
        return RemoteFile(self.snapshot, name, self.meter, endpoint=self._endpoint, share=_PARALLEL)

    converted = False

    def reopen(self, path: Path) -> RemoteCheckpoint:  # noqa: ARG002 - the protocol's signature
        """Always raises InPlaceError: a remote model cannot be copied."""
        raise self._read_only()

    def read_rows(self, name: str, rows: IntArray) -> Rows:
        """Fetches rows, near ones in one request, several requests at a time. Fetched rows are kept in memory.

        Args:
            name: The tensor.
            rows: Sorted row numbers.

        Returns:
            [rows, in_features] in the stored dtype; a copy that may be changed.

        Raises:
            CheckpointFormatError: The tensor is missing, has no rows, or fewer than asked for.
            HubError: The Hub does not deliver them.
        """
        info = self.info(name)
        dtype = row_dtype(info)
        if len(rows) and not 0 <= int(rows[0]) <= int(rows[-1]) < info.rows:
            raise CheckpointFormatError(f"tensor {name} has {info.rows} rows, asked for {int(rows[0])} to {int(rows[-1])}")
        wanted = (name, np.asarray(rows, np.int64).tobytes())
        values = self._kept.get(wanted)
        if values is None:
            values = self._fetch_rows(info, rows)
            with self._lock:
                self._kept[wanted] = values
                # The oldest are dropped when they become too many.
                while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _KEPT:
                    del self._kept[next(iter(self._kept))]
        return values.view(dtype).copy()

    def _fetch_rows(self, info: TensorInfo, rows: IntArray) -> Rows:
        out = np.empty((len(rows), info.row_bytes), np.uint8)

        def fetch(span: _ByteRange) -> None:
            data = self._remote[info.file].read(info.offset + span.start, info.offset + span.stop)
            block = np.frombuffer(data, np.uint8).reshape(-1, info.row_bytes)
            out[span.first : span.last] = block[rows[span.first : span.last] - rows[span.first]]

        with ThreadPoolExecutor(_PARALLEL) as pool:
            futures = [pool.submit(fetch, span) for span in _byte_ranges(rows, info.row_bytes)]
            try:
                for future in futures:
                    future.result()
            except BaseException:  # the first error ends all
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return out

    def write_rows(self, name: str, rows: IntArray, values: Rows) -> None:  # noqa: ARG002 - the protocol's signature
        """Always raises InPlaceError: a remote model can only be read."""
        raise self._read_only()

    def read_all(self, name: str) -> Iterator[bytes]:
        """Reads a whole tensor in blocks, one request each.

        Args:
            name: The tensor.

        Yields:
            Its bytes, in the stored dtype.

        Raises:
            CheckpointFormatError: The tensor is missing.
            HubError: The Hub does not deliver it.
        """
        info = self.info(name)
        for start in range(0, info.nbytes, _PART):
            stop = min(start + _PART, info.nbytes)
            yield self._remote[info.file].read(info.offset + start, info.offset + stop)

    def _read_only(self) -> InPlaceError:
        advice = f"Download it and patch the copy: hf download {self.snapshot.repo_id} --local-dir MODEL"
        return InPlaceError(f"{self.path} is on the Hub and can only be read", advice=advice)

    def _find_files(self) -> tuple[tuple[str, ...], dict[str, str]]:
        """(weight files, tensor name -> file name of the index), as for a directory."""
        present = {name for name in self.snapshot.files if "/" not in name}
        if INDEX in present:
            index = parse_index(self._open(INDEX).read(0, MAX_INDEX), self.path / INDEX)
            for name in sorted(set(index.values()) - present):
                raise CheckpointFormatError(f"{INDEX} of {self.path} names {name}, which is missing")
            return tuple(sorted(set(index.values()))), index
        found = [SINGLE] if SINGLE in present else sorted(name for name in present if name.endswith(".safetensors"))
        if len(found) != 1:
            raise CheckpointFormatError(
                f"{self.path} holds {len(found)} .safetensors files and no {INDEX}",
                advice=f"A model repository has {SINGLE}, or shards with {INDEX}.",
            )
        return (found[0],), {}

    def _read_header(self, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        file = self._remote[path]
        data = file.read(0, _FIRST)
        size = file.size or 0
        stop = 8 + header_length(data[:8], size, path)
        if stop > len(data):
            data += file.read(len(data), stop)
        return parse_header(data[8:stop], size, path)


def open_base(text: str | Path, *, endpoint: str | None = None) -> Checkpoint:
    """Opens a model for reading: a path, or `owner/name[@revision]` on the Hub, also written hub://owner/name.

    What exists on this disk is a path, and what looks like a path is never sent to the Hub (`looks_local`). A complete snapshot
    in the cache of huggingface_hub is used when it is the commit that the Hub names now; with HF_HUB_OFFLINE=1, when it is the
    one that the cache remembers. Otherwise only the rows that are needed are fetched, by a RemoteCheckpoint.

    Args:
        text: The path or the repository.
        endpoint: Address of the Hub; None: that of HF_ENDPOINT.

    Returns:
        The open checkpoint.

    Raises:
        CheckpointFormatError: The text does not name a model.
        HubError: The Hub does not deliver the model.
    """
    from huggingface_hub import constants

    name = str(text)
    # os.path.exists answers no where Path.exists raises.
    if not name.startswith(SCHEME) and os.path.exists(name):  # noqa: PTH110
        return open_checkpoint(name)
    reference = None if looks_local(name) else Reference.parse(name)
    if reference is None:
        advice = "Check the path. A model on the Hugging Face Hub is written hub://owner/name[@revision]."
        raise CheckpointFormatError(f"there is no model at {name}", advice=advice)
    offline = bool(constants.HF_HUB_OFFLINE)
    if offline or reference.commit:
        found = _cached(reference)
        if found is not None:
            return found
    if offline:
        raise HubUnavailableError(
            f"HF_HUB_OFFLINE is set, and the cache of huggingface_hub does not contain all of {reference}",
            advice=f"Unset HF_HUB_OFFLINE, or fill the cache where there is a network: hf download {reference.repo_id}",
        )
    snapshot = look_up(reference.repo_id, reference.revision, endpoint=endpoint)
    return _cached(Reference(snapshot.repo_id, snapshot.commit)) or RemoteCheckpoint(snapshot, endpoint=endpoint)


def _cached(reference: Reference) -> SafetensorsCheckpoint | None:
    """The snapshot of a revision in the cache of huggingface_hub, if all its weights are there."""
    from huggingface_hub import try_to_load_from_cache

    for landmark in _LANDMARKS:
        file = try_to_load_from_cache(reference.repo_id, landmark, revision=reference.revision)
        if isinstance(file, str):
            try:
                return SafetensorsCheckpoint(Path(file).parent)
            except CheckpointFormatError:
                return None  # incomplete: only the tokenizer was downloaded, or a download was stopped
    return None
