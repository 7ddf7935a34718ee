"""Adapters: what a pack changes, in a file of its own that is loaded with the base and leaves it as it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestpatch.errors import CheckpointFormatError
from nestpatch.formats import nest
from nestpatch.formats.gguf.names import expert_of
from nestpatch.formats.lora import gguf as lora_gguf
from nestpatch.formats.lora import onnx as lora_onnx
from nestpatch.formats.lora import peft as lora_peft
from nestpatch.formats.lora.factors import Written
from nestpatch.formats.opening import open_checkpoint
from nestpatch.gate import PackLike, Trust, is_channel, prove
from nestpatch.pack import Pack
from nestpatch.patcher.copies import sweep_unfinished
from nestpatch.patcher.plan import check_strength, make_plan
from nestpatch.patcher.recovery import open_model, require_settled
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.signing.trust import Policy


@dataclass(frozen=True)
class Adapter:
    """An adapter that was written, or with `dry_run` would be."""

    pack: str
    pack_id: str
    strength: float
    """It is in the adapter's numbers: load the adapter at scale 1."""
    format: str
    """"lora" (a directory for PEFT and vLLM), "gguf-lora" (a file for llama.cpp) or "onnx-adapter" (one for onnxruntime)."""
    output: Path
    matrices: int
    rank: int
    """The largest: vLLM must be started with at least this --max-lora-rank."""
    nbytes: int
    seconds: float
    dry_run: bool = False


def export_lora(
    pack: PackLike,
    output: str | Path | None = None,
    strength: float = 1.0,
    *,
    model: str | Path | None = None,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    dry_run: bool = False,
) -> Adapter:
    """Writes a pack as a PEFT adapter directory, which PeftModel.from_pretrained and vLLM load beside the base.

    Without `output` it lies beside the pack's file and is named after the pack. `model` is only needed where the pack changes
    experts that the base stores one by one: their number is counted there. The patch passes the gate first, by `policy`,
    `trust` and `allow_unsigned`, as for `apply_in_place`.

    Raises SignatureError, PackError, DataError, UnsupportedModelError or OutputError; then nothing was written.
    """
    proven = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned)
    return _export("lora", lora_peft.write, pack, proven.pack, output, strength, model, dry_run)


def export_gguf_lora(
    pack: PackLike,
    output: str | Path | None = None,
    strength: float = 1.0,
    *,
    model: str | Path | None = None,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    dry_run: bool = False,
) -> Adapter:
    """Writes a pack as a LoRA adapter in a GGUF file, which llama.cpp loads with the base in whatever type (`--lora`).

    Without `output` it lies beside the pack's file and is named after the pack. `model`, a directory or a GGUF file, is only
    needed where the pack changes experts that the base stores one by one. `policy`, `trust` and `allow_unsigned` are as for
    `apply_in_place`.

    Raises SignatureError, PackError, DataError, UnsupportedModelError or OutputError; then nothing was written.
    """
    proven = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned)
    return _export("gguf-lora", lora_gguf.write, pack, proven.pack, output, strength, model, dry_run)


def export_onnx_adapter(
    pack: PackLike,
    model: str | Path,
    output: str | Path | None = None,
    strength: float = 1.0,
    *,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    dry_run: bool = False,
) -> Adapter:
    """Writes a pack as an .onnx_adapter file for an ONNX model that was exported adapter-ready, whatever its type.

    The model's record of its base is compared with the pack's, and the touched rows are looked at, since the model may have
    been patched where it lies; then onnxruntime loads both, and runs them on two tokens.

    Without `output` it lies beside the pack's file and is named after the pack. `policy`, `trust` and `allow_unsigned` are as
    for `apply_in_place`.

    Raises SignatureError, PackError, DataError, CheckpointFormatError, UnsupportedModelError when the model takes no such
    patch, BaseMismatchError, OutputError or MissingExtraError; then nothing was written.
    """

    def write(pack: Pack, target: Path, factor: float, _: int | None, *, dry_run: bool) -> Written:
        ready = lora_onnx.read_sites(Path(model))
        content = lora_onnx.parameters(pack, ready, factor)
        make_plan(pack, open_model(ready.file)[0], factor)
        return lora_onnx.write(content, ready, target, dry_run=dry_run)

    proven = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned)
    return _export("onnx-adapter", write, pack, proven.pack, output, strength, None, dry_run)


def _export(
    kind: str,
    write: Callable[..., Written],
    source: PackLike,
    pack: Pack,
    output: str | Path | None,
    strength: float,
    model: str | Path | None,
    dry_run: bool,
) -> Adapter:
    began = time.perf_counter()
    check_strength(strength)
    if model is not None:
        require_settled(state_dir_of(model), model)
    single = any(expert_of(delta.name) for delta in pack)
    experts = count_experts(model) if single and model is not None else None
    target = Path(output) if output is not None else default_output(source, pack, kind)
    if not dry_run:
        sweep_unfinished(target)
    written = write(pack, target, strength, experts, dry_run=dry_run)
    return Adapter(
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


def default_output(source: PackLike, pack: Pack, kind: str) -> Path:
    """Beside the pack's file, or in the current directory: "no-harm-1.0.0-lora", "no-harm-1.0.0-lora.gguf"."""
    folder = Path(source).parent if isinstance(source, (str, Path)) and not is_channel(source) else Path()
    ending = {"gguf-lora": "-lora.gguf", "onnx-adapter": lora_onnx.SUFFIX}.get(kind, "-lora")
    return folder / f"{pack.manifest.name}-{pack.manifest.version}{ending}"


def count_experts(model: str | Path) -> int | None:
    """How many experts each layer of a model has, or None where it has none of their own.

    Raises CheckpointFormatError when the model cannot be read.
    """
    if Path(model).suffix == ".gguf":
        return _count_in_gguf(Path(model))
    numbers = [found[1] for name in open_checkpoint(model).tensors() if (found := expert_of(name))]
    return 1 + max(numbers) if numbers else None


def _count_in_gguf(file: Path) -> int | None:
    from gguf import GGUFReader

    try:
        fields: Any = GGUFReader(file).fields
        architecture = fields["general.architecture"].contents()
        count = fields.get(f"{architecture}.expert_count")
        return int(count.contents()) if count is not None else None
    # The reader raises whatever the bytes provoke.
    except Exception as error:
        raise CheckpointFormatError(f"cannot read {file}: {error}") from error
