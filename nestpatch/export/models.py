"""Exporting a model, patched on the way: rows are merged as they are read, and only the result is written."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestpatch.errors import CheckpointFormatError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.export._converter import convert_gguf, require_converter
from nestpatch.export._gguf import WrittenModel, model_name, write_gguf
from nestpatch.export._source import ExportSource, Wanted, open_wanted, require_unchanged, source_of
from nestpatch.files.atomic import check_output, sync_tree
from nestpatch.files.copying import copy_file
from nestpatch.files.hashing import Sink
from nestpatch.files.scratch import new_output
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.formats.gguf.quants import AUTO, file_type
from nestpatch.formats.safetensors import read_header
from nestpatch.gate import PackLike, Trust, prove
from nestpatch.patcher.copies import companions_of, sweep_unfinished
from nestpatch.signing.trust import Policy

ALIGNMENT = 8


def write_file(
    checkpoint: Checkpoint, file: Path, target: Path, metadata: Mapping[str, str], on_event: OnEvent = ignore
) -> tuple[int, str]:
    """Writes one weight file of a checkpoint, its tensors in their old order: (bytes, SHA-256).

    `metadata` is added to what the file says of itself. Raises CheckpointFormatError, OSError.
    """
    infos, own = read_header(file)
    order = sorted(infos.values(), key=lambda info: info.offset)
    header: dict[str, object] = {"__metadata__": dict(sorted({**own, **metadata}.items()))}
    begin = 0
    for info in order:
        header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, begin + info.nbytes]}
        begin += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % ALIGNMENT)
    with Sink(target) as sink:
        sink.write(struct.pack("<Q", len(text)) + text)
        for number, info in enumerate(order, start=1):
            end = sink.nbytes + info.nbytes
            for block in checkpoint.read_all(info.name):
                sink.write(block)
            if sink.nbytes != end:
                raise CheckpointFormatError(f"{file} ends inside tensor {info.name}")
            on_event(Event("export", number, len(order), info.name))
    return sink.nbytes, sink.sha256


@dataclass(frozen=True)
class Exported(WrittenModel):
    """What an export wrote, or with `dry_run` would write."""

    packs: tuple[str, ...] = ()
    """The packs in it, bottom first."""


def export_gguf(
    model: str | Path,
    output: str | Path | None = None,
    pack: PackLike | None = None,
    *,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    strength: float = 1.0,
    type: str = "auto",  # noqa: A002 - the word that users of GGUF files say
    name: str | None = None,
    llama_cpp: str | Path | None = None,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> Exported:
    """Exports a safetensors model to a GGUF file for llama.cpp, with a pack merged into it if one is given.

    `type` is that of the weights: "auto" keeps the checkpoint's; f32, f16, bf16 and q8_0 are written here, others such as
    q4_k_m by llama-cpp-python. `name` is what the file calls the model. `llama_cpp` is a checkout of llama.cpp whose converter
    is used instead. The packs of the model's ledger and the given one are listed in the file under "nestpatch.packs".
    The patch passes the gate first, by `policy`, `trust` and `allow_unsigned`, as for `apply_in_place`.

    Raises SignatureError, PackError, CheckpointError, ChainError, OutputError, DataError, MissingExtraError; then nothing was
    written.
    """
    began = time.perf_counter()
    kind = file_type(type).name
    if llama_cpp is not None:
        require_converter(Path(llama_cpp))
    proven = None
    if pack is not None:
        proven = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned, on_event=on_event)
    wanted = open_wanted(model, proven, strength)
    target = Path(output) if output is not None else wanted.default_output(".gguf", *([] if kind == AUTO else [kind]))
    _make_room(target, dry_run=dry_run)
    before = wanted.fingerprint
    with source_of(wanted, target, whole=llama_cpp is not None, dry_run=dry_run, on_event=on_event) as source:
        common: dict[str, Any] = {
            "kind": kind,
            "name": name or model_name(wanted.checkpoint.path),
            "keys": source.keys(),
            "dry_run": dry_run,
            "on_event": on_event,
            "confirm": lambda: require_unchanged(wanted, before),
        }
        if llama_cpp is not None:
            written = convert_gguf(source.checkpoint, target, Path(llama_cpp), **common)
        else:
            written = write_gguf(source.checkpoint, target, **common)
    facts = vars(written) | {"seconds": time.perf_counter() - began}
    return Exported(**facts, packs=source.labels)


def export_safetensors(
    model: str | Path,
    output: str | Path | None = None,
    pack: PackLike | None = None,
    *,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    strength: float = 1.0,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> Exported:
    """Writes a safetensors model anew, a file or a directory, as a release, with a pack merged into it if one is given.

    What the packs are, and the digests of their rows before and after, go into the metadata of every weight file, so that a
    file alone tells what it holds. Such a copy has no undo record; `apply` makes one that can be reverted. `policy`, `trust`
    and `allow_unsigned` are as for `apply_in_place`.

    Raises SignatureError, PackError, CheckpointError, ChainError, OutputError, DataError; then nothing was written.
    """
    began = time.perf_counter()
    proven = None
    if pack is not None:
        proven = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned, on_event=on_event)
    wanted = open_wanted(model, proven, strength)
    checkpoint = wanted.checkpoint
    suffix = "" if checkpoint.path.is_dir() else ".safetensors"
    target = Path(output) if output is not None else wanted.default_output(suffix, "release")
    _make_room(target, dry_run=dry_run)
    before, written = wanted.fingerprint, ((), ())  # type: tuple[Any, tuple[tuple[int, ...], tuple[str, ...]]]
    with source_of(wanted, target, dry_run=dry_run, on_event=on_event) as source:
        if not dry_run:
            with new_output(target, directory=checkpoint.path.is_dir()) as sibling:
                written = _write_all(source, wanted, sibling, on_event)
                if sibling.is_dir():
                    sync_tree(sibling)
                require_unchanged(wanted, before)
    sizes, digests = written
    names, left_out = checkpoint.tensors(), companions_of(checkpoint)[1]
    return Exported(
        path=target,
        nbytes=sum(sizes),
        sha256=digests[0] if len(digests) == 1 else "",
        tensors=len(names),
        type="/".join(sorted({checkpoint.info(name).dtype for name in names})),
        architecture="",
        packs=source.labels,
        notes=(f"left out, as unpatched weights or links out of the model: {', '.join(left_out)}",) if left_out else (),
        seconds=time.perf_counter() - began,
        dry_run=dry_run,
    )


def _make_room(target: Path, *, dry_run: bool) -> None:
    """Removes what killed processes left there. Raises OutputError when the place is taken or cannot be written."""
    if not dry_run:
        sweep_unfinished(target)
    check_output(target)


def _write_all(
    source: ExportSource, wanted: Wanted, sibling: Path, on_event: OnEvent
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(bytes, SHA-256) of every weight file."""
    directory = wanted.checkpoint.path.is_dir()
    if directory:
        for file in companions_of(wanted.checkpoint)[0]:
            copy_file(file, sibling / file.name)
    files = source.checkpoint.files
    metadata = source.record()
    places = [sibling / file.name if directory else sibling for file in files]
    done = [write_file(source.checkpoint, file, place, metadata, on_event) for file, place in zip(files, places, strict=True)]
    return tuple(nbytes for nbytes, _ in done), tuple(digest for _, digest in done)
