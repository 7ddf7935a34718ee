"""Directories with ONNX models. Packs are applied to one model at a time, which is named by its .onnx file."""

from __future__ import annotations

from pathlib import Path

from nestpatch.errors import CheckpointFormatError

NAME_IT = "Name the .onnx file of the model to patch: a patch changes one of them."


def _names(folder: Path) -> list[str]:
    try:
        return sorted(file.name for file in folder.iterdir())
    except OSError:
        return []


def has_safetensors(folder: Path) -> bool:
    """Whether a directory holds weights that make it a safetensors model, whatever else is in it.

    Args:
        folder: The directory.
    """
    return any(name.endswith((".safetensors", ".safetensors.index.json")) for name in _names(folder))


def models(folder: Path) -> list[Path]:
    """The ONNX models in a directory.

    Args:
        folder: The directory.

    Returns:
        Their files, sorted; none in a safetensors model and in a directory that cannot be read.
    """
    return [] if has_safetensors(folder) else [folder / name for name in _names(folder) if name.endswith(".onnx")]


def only_model(folder: Path) -> Path:
    """The ONNX model of a directory.

    Args:
        folder: The directory.

    Returns:
        Its file.

    Raises:
        CheckpointFormatError: There are several models, or none.
    """
    found = models(folder)
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:5]) + (", .." if len(found) > 5 else "")
        reason = f"{folder} holds {len(found) or 'no'} ONNX models" + (f": {names}" if found else "")
        raise CheckpointFormatError(reason, advice=NAME_IT)
    return found[0]
