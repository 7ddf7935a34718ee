"""A safetensors model on the Hub as a checkpoint that can be read: headers at first, then only the rows that are asked for.

A patch of a model with billions of parameters touches megabytes of it, so these are what its base costs to look at. The commit
is fixed when the checkpoint is made: a branch that moves while rows are read changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
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
from nestpatch.hub.client import SCHEME, Reference, Snapshot, is_commit, look_up, parse_reference
from nestpatch.hub.ranges import Meter, RemoteFile
from nestpatch.rows import Rows

PARALLEL = 8
"""Requests at a time."""
GAP = 256 << 10
"""Bytes between two wanted rows that are read along rather than skipped. Skipping them costs another request: with a round
trip of 100 ms to a CDN and PARALLEL requests at a time an eighth of that, in which a line of 20 MB/s brings 250 kB. On
such a line, simulated, 1 % and 3 % of 8 kB rows took 4.7 and 8.4 s; with no gap 5.8 and 16.6 s, with 1 MiB 7.4 and 16.3."""
PART = 8 << 20
"""Bytes of one request at most, but for a single row."""
KEPT = 256 << 20
"""Bytes of rows kept in memory: a patch looks at its rows twice, to tell the base and to make the result."""
FIRST = 100 << 10
"""Bytes asked for to get a header. Nearly all headers are shorter, and then one request does."""


@dataclass(frozen=True)
class ByteRange:
    """One request for the rows at positions [first, last) of a list, which lie in bytes [start, stop) of the tensor."""

    first: int
    last: int
    start: int
    stop: int


def spans(rows: IntArray, row_bytes: int, *, gap: int = GAP, limit: int = PART) -> list[ByteRange]:
    """Which requests fetch sorted rows: one for those at most `gap` bytes apart, none over `limit` but for a single row."""
    found: list[ByteRange] = []
    for position, row in enumerate(rows.tolist()):
        start, stop = row * row_bytes, (row + 1) * row_bytes
        last = found[-1] if found else None
        if last is not None and start - last.stop <= gap and stop - last.start <= limit:
            found[-1] = ByteRange(last.first, position + 1, last.start, stop)
        else:
            found.append(ByteRange(position, position + 1, start, stop))
    return found


class RemoteCheckpoint(Headers, Checkpoint):
    """The reading half of a checkpoint, over HTTP. Everything else is refused.

    Raises HubError and its kinds, and CheckpointFormatError for a repository that holds no sound safetensors model.
    """

    def __init__(self, snapshot: Snapshot, *, endpoint: str | None = None) -> None:
        self.snapshot = snapshot
        self.path = Path(str(snapshot))
        """For messages: there is nothing on this disk."""
        self.meter = Meter()
        self._kept: dict[tuple[str, bytes], Rows] = {}
        self._lock = Lock()
        self._open: Callable[[str], RemoteFile] = lambda name: RemoteFile(
            snapshot, name, self.meter, endpoint=endpoint, share=PARALLEL
        )
        names, index = self._find_files()
        self.files = tuple(self.path / name for name in names)
        self._remote = {self.path / name: self._open(name) for name in names}
        with ThreadPoolExecutor(PARALLEL) as pool:
            super().__init__(self.path, pool.map(self._read_header, self.files), index)

    @property
    def downloaded(self) -> int:
        """Bytes received so far."""
        return self.meter.bytes

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(file.size or 0 for file in self._remote.values())

    converted = False

    def reopen(self, path: Path) -> RemoteCheckpoint:  # noqa: ARG002 - the protocol's signature
        """Refuses: there is no other place."""
        raise self._fixed()

    def read_rows(self, name: str, rows: IntArray) -> Rows:
        """Fetches sorted rows, [rows, in_features] in the stored dtype; near ones together, some requests at a time."""
        info = self.info(name)
        dtype = row_dtype(info)
        if len(rows) and not 0 <= int(rows[0]) <= int(rows[-1]) < info.rows:
            raise CheckpointFormatError(f"tensor {name} has {info.rows} rows, asked for {int(rows[0])} to {int(rows[-1])}")
        wanted = (name, np.asarray(rows, np.int64).tobytes())
        values = self._kept.get(wanted)
        if values is None:
            values = self._fetch_rows(info, rows)
            self._keep(wanted, values)
        return values.view(dtype).copy()

    def _fetch_rows(self, info: TensorInfo, rows: IntArray) -> Rows:
        out = np.empty((len(rows), info.row_bytes), np.uint8)

        def fetch(span: ByteRange) -> None:
            data = self._remote[info.file].read(info.offset + span.start, info.offset + span.stop)
            block = np.frombuffer(data, np.uint8).reshape(-1, info.row_bytes)
            out[span.first : span.last] = block[rows[span.first : span.last] - rows[span.first]]

        _all(fetch, spans(rows, info.row_bytes))
        return out

    def _keep(self, wanted: tuple[str, bytes], values: Rows) -> None:
        """Keeps rows, which cannot change, and forgets the oldest when they become too many."""
        with self._lock:
            self._kept[wanted] = values
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > KEPT:
                del self._kept[next(iter(self._kept))]

    def write_rows(self, name: str, rows: IntArray, values: Rows) -> None:  # noqa: ARG002 - the protocol's signature
        """Refuses."""
        raise self._fixed()

    def read_all(self, name: str) -> Iterator[bytes]:
        """The tensor's bytes, in blocks, one request each."""
        info = self.info(name)
        for start in range(0, info.nbytes, PART):
            stop = min(start + PART, info.nbytes)
            yield self._remote[info.file].read(info.offset + start, info.offset + stop)

    def _fixed(self) -> InPlaceError:
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
        data = file.read(0, FIRST)
        size = file.size or 0
        stop = 8 + header_length(data[:8], size, path)
        if stop > len(data):
            data += file.read(len(data), stop)
        return parse_header(data[8:stop], size, path)


def _all(work: Callable[[ByteRange], None], items: Sequence[ByteRange]) -> None:
    """Does the work for all items, some at a time; the first error ends it."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


LANDMARKS = (INDEX, SINGLE, "config.json", "README.md", ".gitattributes")
"""Files by which a cached snapshot is found: nearly every model repository has one of them."""


def open_base(text: str | Path, *, endpoint: str | None = None) -> Checkpoint:
    """Opens a model for reading: a path, or `owner/name[@revision]` on the Hub, also written hub://owner/name.

    What exists on this disk is taken as a path. A snapshot in the cache of huggingface_hub is used when it is complete and of
    the very commit that the Hub names now; with HF_HUB_OFFLINE=1 that of the commit which the cache remembers. Otherwise the
    result is a RemoteCheckpoint, which fetches only the rows that are asked for.

    Raises CheckpointFormatError when the text names no model, HubError and its kinds for what the Hub refuses.
    """
    name = str(text)
    # os.path answers no where Path.exists raises.
    if not name.startswith(SCHEME) and os.path.exists(name):  # noqa: PTH110
        return open_checkpoint(name)
    reference = parse_reference(name)
    if reference is None:
        advice = "Give a path, or owner/name[@revision] of a model on the Hugging Face Hub."
        raise CheckpointFormatError(f"there is no model at {name}", advice=advice)
    if _offline():
        return _cached_only(reference)
    if is_commit(reference.revision) and (found := cached(reference)) is not None:
        return found
    snapshot = look_up(reference.repo_id, reference.revision, endpoint=endpoint)
    return cached(Reference(snapshot.repo_id, snapshot.commit)) or RemoteCheckpoint(snapshot, endpoint=endpoint)


def cached(reference: Reference) -> SafetensorsCheckpoint | None:
    """The snapshot of a revision in the cache of huggingface_hub, if all its weights are there."""
    from huggingface_hub import try_to_load_from_cache

    for landmark in LANDMARKS:
        file = try_to_load_from_cache(reference.repo_id, landmark, revision=reference.revision)
        if isinstance(file, str):
            try:
                return SafetensorsCheckpoint(Path(file).parent)
            except CheckpointFormatError:
                return None  # only in part: somebody needed the tokenizer, or a download was stopped
    return None


def _cached_only(reference: Reference) -> Checkpoint:
    found = cached(reference)
    if found is None:
        raise HubUnavailableError(
            f"HF_HUB_OFFLINE is set, and the cache of huggingface_hub does not hold {reference} as a whole",
            advice=f"Unset HF_HUB_OFFLINE, or fill the cache where there is a network: hf download {reference.repo_id}",
        )
    return found


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
