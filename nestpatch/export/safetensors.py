"""Exports a model as a release: safetensors files that list the packs merged into them."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from nestpatch.errors import CheckpointFormatError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.export._source import ExportSource, Request, free_place, open_request, source_of
from nestpatch.export.results import ExportedFile, ExportedSafetensors
from nestpatch.files.atomic import sync_tree
from nestpatch.files.copying import copy_file
from nestpatch.files.hashing import Sink
from nestpatch.files.scratch import new_output
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.formats.safetensors import read_header
from nestpatch.gate import PackLike, Trust, prove
from nestpatch.patcher.copies import companions_of
from nestpatch.patcher.plan import check_strength
from nestpatch.signing.trust import Policy

_ALIGNMENT = 8
"""Bytes: the safetensors format pads its header to a multiple of it."""


def export_safetensors(
    model: str | Path,
    pack: PackLike | None = None,
    output: str | Path | None = None,
    *,
    strength: float = 1.0,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> ExportedSafetensors:
    """Exports a safetensors model to a release, with a pack merged into it if one is given.

    The metadata of every weight file lists the packs in it with the digests of their rows before and after, so that a single
    file is enough to see what it contains. A release has no undo record; `apply` makes copies that can be reverted.

    Args:
        model: A model directory, sharded or not, or a safetensors file. It is not changed.
        pack: The pack to merge, checked as by `apply`.
        output: The file or directory to write; by default beside the model, named after it and the pack.
        strength: Multiplies the pack's deltas, over 0 and up to 1.5.
        policy: The trust policy for the pack; by default that of this user and this machine.
        trust: "none" skips the check of signatures.
        allow_unsigned: Accepts a pack that too few trusted keys have signed.
        dry_run: Checks everything and writes nothing.
        on_event: Receives progress.

    Returns:
        Where the release is, its weight files with their digests, and the packs in it.

    Raises:
        DataError: The strength is out of range.
        OutputError: The output exists or cannot be written.
        SignatureError: The pack is not signed as the policy requires.
        PackError: The pack is broken.
        CheckpointError: The model is broken, was converted already, or is not the pack's base.
        ChainError: The pack does not go together with those in the model.
    """
    began = time.perf_counter()
    check_strength(strength)
    target = None if output is None else free_place(output, dry_run=dry_run)
    proven = None
    if pack is not None:
        proven = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned, on_event=on_event)
    request = open_request(model, proven, strength)
    checkpoint = request.checkpoint
    if target is None:
        suffix = "" if checkpoint.path.is_dir() else ".safetensors"
        target = free_place(request.beside(suffix, "release"), dry_run=dry_run)
    files: tuple[ExportedFile, ...] = ()
    with source_of(request, target, dry_run=dry_run, on_event=on_event) as source:
        if not dry_run:
            with new_output(target, directory=checkpoint.path.is_dir()) as sibling:
                files = _write_all(source, request, sibling, target.name, on_event)
                request.require_unchanged()
    names, left_out = checkpoint.tensors(), companions_of(checkpoint)[1]
    return ExportedSafetensors(
        output=target,
        files=files,
        nbytes=sum(file.nbytes for file in files),
        tensors=len(names),
        type="/".join(sorted({checkpoint.info(name).dtype for name in names})),
        notes=(f"not copied (unpatched weights, or links out of the model): {', '.join(left_out)}",) if left_out else (),
        packs=source.labels,
        strength=strength,
        seconds=time.perf_counter() - began,
        dry_run=dry_run,
    )


def _write_all(source: ExportSource, request: Request, sibling: Path, name: str, on_event: OnEvent) -> tuple[ExportedFile, ...]:
    """Writes the release to a temporary place; `name` is that of its only file where the model is a file."""
    metadata = source.record()
    if not request.checkpoint.path.is_dir():
        (file,) = source.checkpoint.files
        return (ExportedFile(name, *_write_file(source.checkpoint, file, sibling, metadata, on_event)),)
    for file in companions_of(request.checkpoint)[0]:
        copy_file(file, sibling / file.name)
    done = tuple(
        ExportedFile(file.name, *_write_file(source.checkpoint, file, sibling / file.name, metadata, on_event))
        for file in source.checkpoint.files
    )
    sync_tree(sibling)
    return done


def _write_file(
    checkpoint: Checkpoint, file: Path, target: Path, metadata: Mapping[str, str], on_event: OnEvent
) -> tuple[int, str]:
    """Writes one weight file, its tensors in their old order, with `metadata` added to its own. Returns (bytes, SHA-256)."""
    infos, own = read_header(file)
    order = sorted(infos.values(), key=lambda info: info.offset)
    header: dict[str, object] = {"__metadata__": dict(sorted({**own, **metadata}.items()))}
    begin = 0
    for info in order:
        header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, begin + info.nbytes]}
        begin += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
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
