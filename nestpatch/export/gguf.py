"""Exports a model to a GGUF file for llama.cpp, with a pack merged into it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from nestpatch.events import OnEvent, ignore
from nestpatch.export._converter import convert_gguf, require_converter
from nestpatch.export._gguf_writer import write_gguf
from nestpatch.export._model_config import model_name
from nestpatch.export._quantizer import require_quantizer
from nestpatch.export._source import free_place, open_request, source_of
from nestpatch.export.results import ExportedGguf
from nestpatch.formats.gguf.quants import AUTO, file_type
from nestpatch.gate import PackLike, Trust, prove
from nestpatch.patcher.plan import check_strength
from nestpatch.signing.trust import Policy


def export_gguf(
    model: str | Path,
    pack: PackLike | None = None,
    output: str | Path | None = None,
    *,
    strength: float = 1.0,
    type: str = "auto",  # noqa: A002 - the word that users of GGUF files use
    name: str | None = None,
    llama_cpp: str | Path | None = None,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> ExportedGguf:
    """Exports a safetensors model to a GGUF file, with a pack merged into it if one is given.

    The packs of the model's ledger and the given one are listed in the file's metadata under "nestpatch.packs".

    Args:
        model: A model directory, or a weight file with config.json and the tokenizer beside it. It is not changed.
        pack: The pack to merge, checked as by `apply`.
        output: The file to write; by default beside the model, named after it, the pack and the type.
        strength: Multiplies the pack's deltas, over 0 and up to 1.5.
        type: The file type. "auto" keeps the dtypes of the checkpoint; f32, f16, bf16 and q8_0 are written directly; others,
            such as q4_k_m, need llama-cpp-python (the extra `llama`).
        name: The model's name in the metadata; by default that of its directory.
        llama_cpp: A checkout of llama.cpp whose converter is used, for architectures that are not known here.
        policy: The trust policy for the pack; by default that of this user and this machine.
        trust: "none" skips the check of signatures.
        allow_unsigned: Accepts a pack that too few trusted keys have signed.
        dry_run: Checks everything and writes nothing.
        on_event: Receives progress.

    Returns:
        Where the file is, its size, its SHA-256 and the packs in it.

    Raises:
        DataError: The type or the strength is unknown or out of range, or `llama_cpp` has no converter.
        MissingExtraError: The type needs llama-cpp-python.
        OutputError: The output exists or cannot be written.
        SignatureError: The pack is not signed as the policy requires.
        PackError: The pack is broken.
        CheckpointError: The model cannot be exported, or is not the pack's base.
        ChainError: The pack does not go together with those in the model.
    """
    began = time.perf_counter()
    kind = file_type(type)
    check_strength(strength)
    if llama_cpp is not None:
        require_converter(Path(llama_cpp))
    if not kind.direct:
        require_quantizer()
    target = None if output is None else free_place(output, dry_run=dry_run)
    proven = None
    if pack is not None:
        proven = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned, on_event=on_event)
    request = open_request(model, proven, strength)
    if target is None:
        parts = [] if kind.name == AUTO else [kind.name]
        target = free_place(request.beside(".gguf", *parts), dry_run=dry_run)
    name = name or model_name(request.checkpoint.path)
    with source_of(request, target, whole=llama_cpp is not None, dry_run=dry_run, on_event=on_event) as source:
        if llama_cpp is not None:
            done = convert_gguf(
                source.checkpoint,
                target,
                Path(llama_cpp),
                kind=kind.name,
                name=name,
                keys=source.keys(),
                dry_run=dry_run,
                on_event=on_event,
                confirm=request.require_unchanged,
            )
        else:
            done = write_gguf(
                source.checkpoint,
                target,
                kind=kind.name,
                name=name,
                keys=source.keys(),
                dry_run=dry_run,
                on_event=on_event,
                confirm=request.require_unchanged,
            )
    return replace(done, packs=source.labels, strength=strength, seconds=time.perf_counter() - began)
