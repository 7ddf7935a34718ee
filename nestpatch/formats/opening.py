"""Opens a model of any format. A new format is a new file and a line here."""

from __future__ import annotations

import os
from pathlib import Path

from nestpatch.errors import CheckpointFormatError
from nestpatch.files.reading import open_regular
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.formats.onnx.folder import NAME_IT, has_safetensors, models
from nestpatch.formats.safetensors import SafetensorsCheckpoint


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a model.

    Args:
        path: A safetensors file, a directory with one or with an index of several, a GGUF file, or an ONNX model. A directory
            without safetensors weights is an ONNX model when it holds one.

    Returns:
        The checkpoint; only headers have been read.

    Raises:
        CheckpointFormatError: There is no model at the path, or several, or a broken one.
    """
    place = Path(path)
    # os.path returns False where Path.exists raises: for names too long, with a NUL, or in folders that may not be read.
    if not os.path.exists(place):  # noqa: PTH110
        raise CheckpointFormatError(f"there is no model at {place}", advice="Check the path.")
    if not place.is_dir():
        open_regular(place, error=CheckpointFormatError).close()
    if place.suffix == ".onnx" or (place.is_dir() and models(place)):
        from nestpatch.formats.onnx.checkpoint import OnnxCheckpoint

        return OnnxCheckpoint(place)
    if place.is_dir() and (below := models(place / "onnx")) and not has_safetensors(place):
        raise CheckpointFormatError(
            f"{place} has its ONNX models in {place / 'onnx'}: {', '.join(file.name for file in below[:5])}", advice=NAME_IT
        )
    if place.is_dir() or place.suffix == ".safetensors":
        return SafetensorsCheckpoint(place)
    if place.suffix == ".gguf":
        from nestpatch.formats.gguf.checkpoint import GgufCheckpoint

        return GgufCheckpoint(place)
    if place.suffix == ".ort":
        raise CheckpointFormatError(
            f"{place} is in ORT format, which is made from an ONNX model", advice="Patch the .onnx file and convert it again."
        )
    raise CheckpointFormatError(
        f"{place} is not a model file in a format that nestpatch reads",
        advice="Give a .safetensors, .gguf or .onnx file, or a model directory.",
    )
