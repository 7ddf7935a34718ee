"""What identifies the content of a run directory and its inputs: digests of JSON values, tensors, arrays and a base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nestpatch.errors import CheckpointFormatError
from nestpatch.files.reading import open_regular
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.patcher.state_dir import LEDGER
from nestpatch.rows import FloatArray
from nestpatch.runtimes.loading import READ_WHOLE

if TYPE_CHECKING:
    import torch

_BLOCK = 16 << 20


def base_digest(checkpoint: Checkpoint, path: Path) -> str:
    """The identity of a base: everything that transformers reads of it.

    Args:
        checkpoint: The base.
        path: Its directory or file.

    Returns:
        SHA-256, hex, of the weights, and of the configuration, the tokenizer and the chat template beside them.

    Raises:
        CheckpointFormatError: A file cannot be read.
    """
    files = {file.name: file for file in checkpoint.files}
    if path.suffix != ".gguf":
        folder = path if path.is_dir() else path.parent
        beside = [f for f in folder.iterdir() if f.suffix in READ_WHOLE and not f.name.endswith(LEDGER) and f.is_file()]
        files |= {file.name: file for file in beside}
    whole = sha256()
    for name in sorted(files):
        state = sha256()
        with open_regular(files[name], error=CheckpointFormatError) as file:
            while block := file.read(_BLOCK):
                state.update(block)
        whole.update(f"{name} {state.hexdigest()}\n".encode())
    return whole.hexdigest()


def digest_json(value: Any) -> str:
    """The digest of a JSON value, to be an input.

    Args:
        value: Any JSON value.

    Returns:
        SHA-256, hex.
    """
    return sha256(encode_json(value).encode()).hexdigest()


def encode_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def require_digest(stated: Any, found: str) -> None:
    if stated != found:
        raise ValueError("its content is not what was written")


def digest_tensors(facts: Any, tensors: Mapping[str, torch.Tensor]) -> str:
    state = sha256(encode_json(facts).encode())
    for name in sorted(tensors):
        array = tensors[name].numpy()
        state.update(f"{name} {array.dtype} {array.shape}".encode())
        state.update(array.tobytes())
    return state.hexdigest()


def digest_array(array: FloatArray, *, finite: bool = False) -> str:
    """SHA-256 of an array, read in blocks; with `finite`, raises ValueError where a number is not."""
    state, step = sha256(), max(1, _BLOCK // max(1, 4 * array.shape[1]))
    for start in range(0, len(array), step):
        part = np.ascontiguousarray(array[start : start + step])
        if finite and not np.isfinite(part).all():
            raise ValueError("it contains numbers that are not finite")
        state.update(part.data)
    return state.hexdigest()
