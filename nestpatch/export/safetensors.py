"""Exports a model as a release: safetensors files that list the packs merged into them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from nestpatch import __version__
from nestpatch.errors import DataError
from nestpatch.events import OnEvent, ignore
from nestpatch.export._safetensors_writer import write_file, write_float_model
from nestpatch.export._source import ExportSource, Request, free_place, open_request, source_of
from nestpatch.export.results import ExportedFile, ExportedSafetensors
from nestpatch.files.atomic import sync_tree
from nestpatch.files.copying import copy_file
from nestpatch.files.scratch import new_output
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.formats.gguf.hf.model import AUTO, FloatModel, float_type
from nestpatch.formats.provenance import VERSION
from nestpatch.formats.safetensors import SINGLE, read_header
from nestpatch.gate import PackLike, Trust, prove
from nestpatch.patcher.copies import companions_of
from nestpatch.patcher.plan import check_strength
from nestpatch.signing.trust import Policy


def export_safetensors(
    model: str | Path,
    pack: PackLike | None = None,
    output: str | Path | None = None,
    *,
    strength: float = 1.0,
    type: str = "auto",  # noqa: A002 - the word of the other exports
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> ExportedSafetensors:
    """Exports a safetensors model to a release, with a pack merged into it if one is given; a GGUF file to a float model.

    The metadata of every weight file lists the packs in it with the digests of their rows before and after, so that a single
    file is enough to see what it contains. A release has no undo record; `apply` makes copies that can be reverted.

    Args:
        model: A model directory, sharded or not, a safetensors file, or a GGUF file. It is not changed.
        pack: The pack to merge, checked as by `apply`; not into a GGUF file.
        output: The file or directory to write; by default beside the model, named after it and the pack.
        strength: Multiplies the pack's deltas, over 0 and up to 1.5.
        type: Of the weights of a GGUF file. "auto" keeps float types, and gives quantized weights as f32, which holds them
            exactly; bf16 and f32 are for all weights.
        policy: The trust policy for the pack; by default that of this user and this machine.
        trust: "none" skips the check of signatures.
        allow_unsigned: Accepts a pack that too few trusted keys have signed.
        dry_run: Checks everything and writes nothing.
        on_event: Receives progress.

    Returns:
        Where the release is, its weight files with their digests, and the packs in it.

    Raises:
        DataError: The strength is out of range, or the type is unknown or not for this model.
        OutputError: The output exists or cannot be written.
        SignatureError: The pack is not signed as the policy requires.
        PackError: The pack is broken.
        CheckpointError: The model is broken, was converted in another way, or is not the pack's base.
        ChainError: The pack does not go together with those in the model.
    """
    began = time.perf_counter()
    kind = float_type(type)
    check_strength(strength)
    target = None if output is None else free_place(output, dry_run=dry_run)
    proven = None
    if pack is not None:
        proven = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned, on_event=on_event)
    request = open_request(model, proven, strength, gguf=True)
    checkpoint = request.checkpoint
    if kind != AUTO and not request.gguf:
        raise DataError("the weights of a safetensors model keep their types", advice="--type is for GGUF files.")
    is_folder = request.gguf or checkpoint.path.is_dir()
    if target is None:
        parts = [] if kind == AUTO else [kind]
        target = free_place(request.beside("" if is_folder else ".safetensors", "release", *parts), dry_run=dry_run)
    files: tuple[ExportedFile, ...] = ()
    with source_of(request, target, kind=kind, dry_run=dry_run, on_event=on_event) as source:
        written = source.checkpoint
        if isinstance(written, FloatModel):
            written.companions  # noqa: B018 - the tokenizer is read before gigabytes are written
        if not dry_run:
            with new_output(target, directory=is_folder) as sibling:
                files = _write_all(source, request, sibling, target.name, on_event)
                request.require_unchanged()
    names, left_out = written.tensors(), () if request.gguf else companions_of(checkpoint)[1]
    return ExportedSafetensors(
        output=target,
        files=files,
        nbytes=sum(file.nbytes for file in files),
        tensors=len(names),
        type="/".join(sorted({written.info(name).dtype for name in names})),
        notes=(f"not copied (unpatched weights, or links out of the model): {', '.join(left_out)}",) if left_out else (),
        packs=source.labels,
        strength=strength,
        seconds=time.perf_counter() - began,
        dry_run=dry_run,
    )


def _write_all(source: ExportSource, request: Request, sibling: Path, name: str, on_event: OnEvent) -> tuple[ExportedFile, ...]:
    """Writes the release to a temporary place; `name` is that of its only file where the model is a file."""
    if isinstance(source.checkpoint, FloatModel):
        # The digests of a ledger are those of quantized rows: they say nothing of these.
        metadata = {VERSION: __version__, **source.keys()}
        return (ExportedFile(SINGLE, *write_float_model(source.checkpoint, sibling, metadata, on_event)),)
    metadata = source.record()
    if not request.checkpoint.path.is_dir():
        (file,) = source.checkpoint.files
        return (ExportedFile(name, *_rewrite(source.checkpoint, file, sibling, metadata, on_event)),)
    for file in companions_of(request.checkpoint)[0]:
        copy_file(file, sibling / file.name)
    done = tuple(
        ExportedFile(file.name, *_rewrite(source.checkpoint, file, sibling / file.name, metadata, on_event))
        for file in source.checkpoint.files
    )
    sync_tree(sibling)
    return done


def _rewrite(
    checkpoint: Checkpoint, file: Path, target: Path, metadata: Mapping[str, str], on_event: OnEvent
) -> tuple[int, str]:
    """Writes one weight file, its tensors in their old order, with `metadata` added to its own. Returns (bytes, SHA-256)."""
    infos, own = read_header(file)
    order = sorted(infos.values(), key=lambda info: info.offset)
    return write_file(checkpoint, order, target, {**own, **metadata}, on_event)
