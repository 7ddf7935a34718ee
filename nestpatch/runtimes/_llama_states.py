"""Hidden states in llama.cpp: the output of a layer, read by a callback while a context computes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from nestpatch.errors import CheckpointError
from nestpatch.rows import FloatArray

_NAME = "l_out-{}"
"""What llama.cpp calls the output of a layer."""
_POINTER = ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_get_name": (ctypes.c_char_p, [_POINTER]),
    "ggml_nelements": (ctypes.c_int64, [_POINTER]),
    "ggml_nbytes": (ctypes.c_size_t, [_POINTER]),
    "ggml_backend_tensor_get": (None, [_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_size_t]),
}
"""What is called of ggml, which llama-cpp-python has no bindings for: result, arguments."""


class LayerOutput:
    """Collects what one layer of a context computes.

    Attributes:
        callback: For `cb_eval` of the context's parameters. llama.cpp calls it, so this object outlives the context.
    """

    def __init__(self, library: Any, layer: int, width: int) -> None:
        """Prepares the callback.

        Args:
            library: The module of llama-cpp-python.
            layer: The layer, from 0.
            width: Numbers of a hidden state.

        Raises:
            CheckpointError: The library does not give tensors away.
        """
        self._name, self._width = _NAME.format(layer).encode(), width
        self._parts: list[FloatArray] = []
        self._ggml = {name: _bound(library, name) for name in _SIGNATURES}
        self.callback = library.ggml_backend_sched_eval_callback(self._see)

    def _see(self, tensor: int, ask: bool, _: Any) -> bool:
        """Called before a tensor is computed, and again afterwards where the answer was True."""
        if self._ggml["ggml_get_name"](tensor) != self._name:
            return not ask
        elements, nbytes = self._ggml["ggml_nelements"](tensor), self._ggml["ggml_nbytes"](tensor)
        if not ask and nbytes == 4 * elements and elements % self._width == 0:
            part = np.empty((elements // self._width, self._width), np.float32)
            self._ggml["ggml_backend_tensor_get"](tensor, part.ctypes.data, 0, nbytes)
            self._parts.append(part)
        return True

    def take(self, tokens: int) -> FloatArray:
        """The states since the last call.

        Args:
            tokens: How many were computed.

        Returns:
            float32 [tokens, width].

        Raises:
            CheckpointError: llama.cpp has not shown as many.
        """
        parts, self._parts = self._parts, []
        if sum(map(len, parts)) != tokens:
            name, found = self._name.decode(), sum(map(len, parts))
            raise CheckpointError(
                f"llama.cpp showed {found} of {tokens} hidden states as {name}",
                advice="Give the model as a directory of transformers: this architecture names its layers in another way.",
            )
        return np.concatenate(parts)


def pool(states: FloatArray, pooling: str) -> FloatArray:
    """The hidden states of a prompt as one.

    Args:
        states: [tokens, hidden].
        pooling: One of `nestpatch.detector.POOLINGS`.

    Returns:
        float32 [hidden].
    """
    found: FloatArray = states[-1] if pooling == "last" else states.max(0) if pooling == "max" else states.mean(0)
    return found


def positions(ids: Sequence[int], batch: int) -> list[list[tuple[int, int, int, bool]]]:
    """One sequence as batches of (token, position, sequence, wanted), for `LlamaRuntime`.

    Args:
        ids: Token ids.
        batch: Tokens of a batch at most.

    Returns:
        The batches; only the last token's logits are wanted.
    """
    entries = [(token, place, 0, place == len(ids) - 1) for place, token in enumerate(ids)]
    return [entries[start : start + batch] for start in range(0, len(entries), batch)]


def _bound(library: Any, name: str) -> Any:
    """A function of ggml."""
    try:
        function = library._lib[name]  # a function of its own: others keep their signatures
    except AttributeError as error:
        raise CheckpointError(
            f"this llama-cpp-python does not give hidden states: it has no {name}",
            advice="Give the model as a directory of transformers, or install the version of constraints.txt.",
        ) from error
    function.restype, function.argtypes = _SIGNATURES[name]
    return function
