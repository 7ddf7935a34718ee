"""Exports a pack as an adapter: a file of its own that is loaded beside the base, which stays as it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from nestpatch.export._source import free_place
from nestpatch.export.results import ExportedAdapter
from nestpatch.formats import nest
from nestpatch.formats.gguf.header import read_header
from nestpatch.formats.gguf.names import expert_of
from nestpatch.formats.lora import gguf as lora_gguf
from nestpatch.formats.lora import onnx as lora_onnx
from nestpatch.formats.lora import peft as lora_peft
from nestpatch.formats.lora.factors import Written
from nestpatch.formats.opening import open_checkpoint
from nestpatch.gate import PackLike, Trust, is_channel, prove
from nestpatch.pack import Pack
from nestpatch.patcher.plan import check_strength, make_plan
from nestpatch.patcher.recovery import open_model, require_settled
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.signing.trust import Policy

_ENDINGS = {"lora": "-lora", "gguf-lora": "-lora.gguf", "onnx-adapter": lora_onnx.SUFFIX}


def export_lora(
    pack: PackLike,
    output: str | Path | None = None,
    *,
    model: str | Path | None = None,
    strength: float = 1.0,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    dry_run: bool = False,
) -> ExportedAdapter:
    """Exports a pack to a PEFT adapter directory, which PeftModel.from_pretrained and vLLM load beside the base.

    Args:
        pack: The pack, checked as by `apply`.
        output: The directory to write; by default beside the pack's file, named after the pack.
        model: The base. Needed only where the pack changes experts that the base stores one by one: it gives their number.
        strength: Multiplies the pack's deltas, over 0 and up to 1.5. Load the adapter at scale 1.
        policy: The trust policy for the pack; by default that of this user and this machine.
        trust: "none" skips the check of signatures.
        allow_unsigned: Accepts a pack that too few trusted keys have signed.
        dry_run: Checks everything and writes nothing.

    Returns:
        Where the adapter is, its rank and its size.

    Raises:
        DataError: The strength is out of range.
        OutputError: The output exists or cannot be written.
        SignatureError: The pack is not signed as the policy requires.
        PackError: The pack is broken.
        UnsupportedModelError: PEFT has no adapter for these weights.
    """
    target = _checked(output, strength, dry_run=dry_run)
    proven = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned)
    target = target or free_place(adapter_output(pack, proven.pack, "lora"), dry_run=dry_run)
    return _export("lora", lora_peft.write, proven.pack, target, strength, model, dry_run)


def export_gguf_lora(
    pack: PackLike,
    output: str | Path | None = None,
    *,
    model: str | Path | None = None,
    strength: float = 1.0,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    dry_run: bool = False,
) -> ExportedAdapter:
    """Exports a pack to a LoRA adapter in a GGUF file, which llama.cpp loads beside a base of any file type (`--lora`).

    Args:
        pack: The pack, checked as by `apply`.
        output: The file to write; by default beside the pack's file, named after the pack.
        model: The base, a directory or a GGUF file. Needed only where the pack changes experts that the base stores one by
            one: it gives their number.
        strength: Multiplies the pack's deltas, over 0 and up to 1.5. Load the adapter at scale 1.
        policy: The trust policy for the pack; by default that of this user and this machine.
        trust: "none" skips the check of signatures.
        allow_unsigned: Accepts a pack that too few trusted keys have signed.
        dry_run: Checks everything and writes nothing.

    Returns:
        Where the adapter is, its rank and its size.

    Raises:
        DataError: The strength is out of range.
        OutputError: The output exists or cannot be written.
        SignatureError: The pack is not signed as the policy requires.
        PackError: The pack is broken.
        UnsupportedModelError: llama.cpp has no adapter for these weights.
    """
    target = _checked(output, strength, dry_run=dry_run)
    proven = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned)
    target = target or free_place(adapter_output(pack, proven.pack, "gguf-lora"), dry_run=dry_run)
    return _export("gguf-lora", lora_gguf.write, proven.pack, target, strength, model, dry_run)


def export_onnx_adapter(
    pack: PackLike,
    output: str | Path | None = None,
    *,
    model: str | Path,
    strength: float = 1.0,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    dry_run: bool = False,
) -> ExportedAdapter:
    """Exports a pack to an .onnx_adapter file for an ONNX model that was exported adapter-ready.

    The model's record of its base is compared with the pack's, and the touched rows are checked, since the model may have been
    patched in place. Then onnxruntime loads both and runs them on two tokens.

    Args:
        pack: The pack, checked as by `apply`.
        output: The file to write; by default beside the pack's file, named after the pack.
        model: The adapter-ready ONNX model. Its matrices may be quantized.
        strength: Multiplies the pack's deltas, over 0 and up to 1.5.
        policy: The trust policy for the pack; by default that of this user and this machine.
        trust: "none" skips the check of signatures.
        allow_unsigned: Accepts a pack that too few trusted keys have signed.
        dry_run: Checks everything and writes nothing.

    Returns:
        Where the adapter is, its rank and its size.

    Raises:
        DataError: The strength is out of range.
        OutputError: The output exists or cannot be written, or onnxruntime cannot run the model with the adapter.
        SignatureError: The pack is not signed as the policy requires.
        PackError: The pack is broken.
        CheckpointFormatError: The model is broken.
        UnsupportedModelError: The model does not accept this pack at run time.
        BaseMismatchError: The model was made from another base, or contains the pack already.
        MissingExtraError: onnxruntime is not installed.
    """

    def write(pack: Pack, target: Path, factor: float, _: int | None, *, dry_run: bool) -> Written:
        ready = lora_onnx.read_sites(Path(model))
        content = lora_onnx.parameters(pack, ready, factor)
        make_plan(pack, open_model(ready.file)[0], factor)
        return lora_onnx.write(content, ready, target, dry_run=dry_run)

    target = _checked(output, strength, dry_run=dry_run)
    proven = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned)
    target = target or free_place(adapter_output(pack, proven.pack, "onnx-adapter"), dry_run=dry_run)
    return _export("onnx-adapter", write, proven.pack, target, strength, None, dry_run)


def adapter_output(source: PackLike, pack: Pack, kind: str) -> Path:
    """The default output of an adapter.

    Args:
        source: The pack as the user named it.
        pack: Its content.
        kind: "lora", "gguf-lora" or "onnx-adapter".

    Returns:
        A path beside the pack's file, or in the current directory: "no-harm-1.0.0-lora", "no-harm-1.0.0-lora.gguf".
    """
    folder = Path(source).parent if isinstance(source, (str, Path)) and not is_channel(source) else Path()
    return folder / f"{pack.manifest.name}-{pack.manifest.version}{_ENDINGS[kind]}"


def _checked(output: str | Path | None, strength: float, *, dry_run: bool) -> Path | None:
    """Checks before any work what would fail at the end of it."""
    check_strength(strength)
    return None if output is None else free_place(output, dry_run=dry_run)


def _export(
    kind: str,
    write: Callable[..., Written],
    pack: Pack,
    target: Path,
    strength: float,
    model: str | Path | None,
    dry_run: bool,
) -> ExportedAdapter:
    began = time.perf_counter()
    if model is not None:
        require_settled(state_dir_of(model), model)
    single = any(expert_of(delta.name) for delta in pack)
    experts = _count_experts(model) if single and model is not None else None
    written = write(pack, target, strength, experts, dry_run=dry_run)
    return ExportedAdapter(
        pack=pack.label,
        pack_id=nest.pack_id(pack),
        strength=strength,
        format=kind,
        output=target,
        matrices=written.matrices,
        rank=written.rank,
        nbytes=written.nbytes,
        seconds=time.perf_counter() - began,
        dry_run=dry_run,
    )


def _count_experts(model: str | Path) -> int | None:
    """The number of experts of each layer; None for a model without. Raises CheckpointFormatError."""
    if Path(model).suffix == ".gguf":
        metadata = read_header(Path(model)).metadata
        count = metadata.get(f"{metadata.get('general.architecture')}.expert_count")
        return count if isinstance(count, int) else None
    numbers = [found[1] for name in open_checkpoint(model).tensors() if (found := expert_of(name))]
    return 1 + max(numbers) if numbers else None
