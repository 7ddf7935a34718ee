"""Directories with ONNX models. Packs are applied to one model at a time: it goes by its .onnx file."""

from __future__ import annotations

from pathlib import Path

from nestpatch.errors import CheckpointFormatError

ENDING = ".onnx"
SAFETENSORS = (".safetensors", ".safetensors.index.json")


def models(folder: Path) -> list[Path]:
    """The ONNX models in a directory that holds no safetensors weights; those are what such a directory is otherwise."""
    try:
        names = sorted(file.name for file in folder.iterdir())
    except OSError:
        return []
    if any(name.endswith(SAFETENSORS) for name in names):
        return []
    return [folder / name for name in names if name.endswith(ENDING)]


def only_model(folder: Path) -> Path:
    """The model of a directory. Raises CheckpointFormatError where there are several, or none."""
    found = models(folder)
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:5]) + (", .." if len(found) > 5 else "")
        raise CheckpointFormatError(
            f"{folder} holds {len(found) or 'no'} ONNX models" + (f": {names}" if found else ""),
            advice="Name the file of the model that is to be patched: a patch changes one of them.",
        )
    return found[0]
