"""Directories with ONNX models. Packs are applied to one model at a time: it goes by its .onnx file."""

from __future__ import annotations

from pathlib import Path

from nestpatch.errors import CheckpointFormatError

ENDING = ".onnx"
NAME_IT = "Name the file of the model that is to be patched: a patch changes one of them."
SAFETENSORS = (".safetensors", ".safetensors.index.json")


def has_safetensors(folder: Path) -> bool:
    """Whether a directory holds weights that make it a safetensors model, whatever else is in it."""
    return any(name.endswith(SAFETENSORS) for name in _names(folder))


def models(folder: Path) -> list[Path]:
    """The ONNX models in a directory that is no safetensors model."""
    if has_safetensors(folder):
        return []
    return [folder / name for name in _names(folder) if name.endswith(ENDING)]


def only_model(folder: Path) -> Path:
    """The model of a directory. Raises CheckpointFormatError where there are several, or none."""
    found = models(folder)
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:5]) + (", .." if len(found) > 5 else "")
        reason = f"{folder} holds {len(found) or 'no'} ONNX models" + (f": {names}" if found else "")
        raise CheckpointFormatError(reason, advice=NAME_IT)
    return found[0]


def _names(folder: Path) -> list[str]:
    try:
        return sorted(file.name for file in folder.iterdir())
    except OSError:
        return []
