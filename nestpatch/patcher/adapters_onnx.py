"""A pack as an adapter for onnxruntime: a file of its own, loaded beside the base, which stays as it is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from nestpatch.formats import lora_onnx, nest
from nestpatch.pack import Pack
from nestpatch.patcher.plan import check_strength


@dataclass(frozen=True)
class OnnxAdapter:
    """An adapter that was written, or with `dry_run` would be."""

    pack: str
    pack_id: str
    strength: float
    """It is in the adapter's numbers."""
    output: Path
    model: Path
    """The adapter-ready ONNX file that it is for."""
    matrices: int
    vectors: int
    """The most that one matrix gets."""
    nbytes: int
    seconds: float
    dry_run: bool = False


def export_onnx_adapter(
    patch: str | Path | Pack, model: str | Path, output: str | Path, strength: float = 1.0, *, dry_run: bool = False
) -> OnnxAdapter:
    """Writes a pack as an .onnx_adapter file for an ONNX model that was exported adapter-ready, whatever its type.

    The model's record of its base is compared with the pack's; then onnxruntime loads both, and runs them on two tokens.

    Raises PackError, DataError, CheckpointFormatError, UnsupportedModelError when the model takes no such patch,
    BaseMismatchError, OutputError or MissingExtraError; then nothing was written.
    """
    began = time.perf_counter()
    check_strength(strength)
    pack = patch if isinstance(patch, Pack) else nest.read(patch)
    ready = lora_onnx.read_sites(Path(model))
    content = lora_onnx.parameters(pack, ready, strength)
    nbytes = sum(values.nbytes for values in content.values()) if dry_run else lora_onnx.write(content, ready, Path(output))
    return OnnxAdapter(
        pack=pack.label,
        pack_id=nest.pack_id(pack),
        strength=strength,
        output=Path(output),
        model=ready.file,
        matrices=len(pack.deltas),
        vectors=max(delta.clusters for delta in pack),
        nbytes=nbytes,
        seconds=time.perf_counter() - began,
        dry_run=dry_run,
    )
