"""The models of one restoration: opened side by side, with the matrices that are compared row by row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from nestpatch.errors import CheckpointFormatError, DataError, RestorationError
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.formats.gguf.checkpoint import GgufCheckpoint
from nestpatch.formats.gguf.hf.model import FloatModel
from nestpatch.packing import require_packable
from nestpatch.patcher.recovery import open_model

_FEED_FORWARD = re.compile(
    r".*\.(?:gate_proj|up_proj|down_proj|gate_up_proj|w[123]|fc[12]|fc_in|fc_out|dense_h_to_4h|dense_4h_to_h)(?:\.weight)?"
)
"""The matrices of feed-forward blocks, as transformers names them."""
_SHOWN = 3
"""Names that an error lists."""


def open_models(paths: Mapping[str, str | Path]) -> dict[str, Checkpoint]:
    """Opens the models of a restoration.

    Args:
        paths: Role ("TUNED", "BASE") -> where the model is.

    Returns:
        Role -> the model; only headers have been read.

    Raises:
        CheckpointError: A model cannot be read, or is in a format whose tensors have no names of transformers.
        BusyError: Another process is writing one of the models.
        JournalError: A change of one of the models was interrupted.
    """
    models = {role: open_model(path)[0] for role, path in paths.items()}
    for role, model in models.items():
        if model.converted and not isinstance(model, GgufCheckpoint):
            raise CheckpointFormatError(
                f"{role} {model.path} is an ONNX model; restoring compares safetensors and GGUF models",
                advice="Give the safetensors model. The pack can be applied to its ONNX files then.",
            )
    return models


def matrices(models: Mapping[str, Checkpoint], patterns: Sequence[str] = ()) -> tuple[str, ...]:
    """The matrices that are compared: those of the feed-forward blocks, or those that patterns name.

    Args:
        models: Role -> model. The first one is that which the pack is for.
        patterns: Globs of tensor names as transformers has them; none for the feed-forward blocks.

    Returns:
        Names that packs use, sorted. All models have them, in one shape and dtype.

    Raises:
        DataError: No matrix has such a name.
        RestorationError: The models differ in names, shapes or dtypes.
        QuantizationError: A type cannot be read here, or no pack can have it as its base.
    """
    first = next(iter(models.values()))
    # A GGUF file has names of its own, and finds its tensors by those of transformers as well.
    listed = (FloatModel(first) if isinstance(first, GgufCheckpoint) else first).tensors()
    wanted = [name for name in listed if _is_wanted(name, patterns)]
    names = tuple(sorted(name for name in wanted if len(first.info(name).shape) in (2, 3)))
    if not names:
        what = f"matches {', '.join(patterns)}" if patterns else "is one of a feed-forward block"
        some = ", ".join(list(listed)[:_SHOWN])
        raise DataError(f"no matrix of {first.path} {what}", advice=f"Give --tensor GLOB; its tensors are {some}, ...")
    for name in names:
        require_alike(models, name)
    return names


def _is_wanted(name: str, patterns: Sequence[str]) -> bool:
    if patterns:
        return any(fnmatchcase(name, pattern) for pattern in patterns)
    return _FEED_FORWARD.fullmatch(name) is not None


def require_alike(models: Mapping[str, Checkpoint], name: str) -> None:
    """Checks that a matrix is of one shape and dtype in all models.

    Args:
        models: Role -> model. The first one is that which the pack is for.
        name: The matrix.

    Raises:
        RestorationError: A model lacks it, or has it in another shape or dtype.
        QuantizationError: The type cannot be read here, or no pack can have it as its base.
    """
    (role, model), *others = models.items()
    if not model.has(name):
        raise RestorationError(f"{role} {model.path} has no tensor {name}", advice=_ONE_FAMILY)
    info = require_packable(model, name)
    for other_role, other in others:
        if not other.has(name):
            raise RestorationError(
                f"{other_role} {other.path} has no tensor {name}, which {role} {model.path} has", advice=_ONE_FAMILY
            )
        found = other.info(name)
        if found.shape != info.shape:
            sides = f"{list(info.shape)} in {role} and {list(found.shape)} in {other_role}"
            raise RestorationError(f"{name} has shape {sides} {other.path}", advice=_ONE_FAMILY)
        if found.dtype != info.dtype:
            # Rounding alone would make every row differ.
            raise RestorationError(
                f"{name} is {info.dtype} in {role} {model.path} and {found.dtype} in {other_role} {other.path}",
                advice="Give models that are stored in one dtype.",
            )


_ONE_FAMILY = "Give models of one architecture: a base, its aligned version and a fine-tune of either."
