"""The types of GGUF files: float32 to blocks of a tensor type and back, and the file types that mix them.

llama.cpp's own ggml library quantizes where llama-cpp-python is installed; else the `gguf` package does, for the types that it
has, with the same bytes. Each row is quantized by itself: a few rows give the bytes that the whole tensor would give.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.errors import DataError, QuantizationError
from nestpatch.files.threads import in_parts
from nestpatch.formats._codec import Blocks, Codec, FloatCodec
from nestpatch.formats.gguf.package import gguf_module
from nestpatch.rows import DTYPES, FloatArray

_NEEDS_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
"""Types whose quantizer needs an importance matrix; some of them abort the process without one."""
_STEPS = {"Q2_K": 3, "TQ1_0": 2, "TQ2_0": 2, "Q3_K": 7, "IQ3_S": 7, "Q5_0": 31, "Q5_1": 31, "Q5_K": 31, "Q6_K": 63, "Q8_0": 254}
"""Steps between the smallest and the largest value of a block; 15 for all other types."""
_WORTHWHILE = 1 << 15
"""Numbers from which quantizing takes longer than starting a thread."""
_LIBRARY = {"linux": "libggml-base.so", "darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}


def _type(name: str) -> Any:
    try:
        return gguf_module("constants").GGMLQuantizationType[name]
    except KeyError:
        raise QuantizationError(f"{name} is not a tensor type of GGUF files") from None


@lru_cache(maxsize=64)
def block(name: str) -> tuple[int, int]:
    """The size of a block.

    Args:
        name: The tensor type.

    Returns:
        (elements, bytes).

    Raises:
        QuantizationError: There is no such type.
    """
    elements, nbytes = gguf_module("constants").GGML_QUANT_SIZES[_type(name)]
    return int(elements), int(nbytes)


def row_bytes(name: str, width: int) -> int:
    """The size of a row.

    Args:
        name: The tensor type.
        width: Elements of the row.

    Returns:
        Bytes.

    Raises:
        QuantizationError: There is no such type, or its blocks do not divide the row.
    """
    elements, nbytes = block(name)
    if width % elements:
        raise QuantizationError(f"rows of {width} elements do not fit into {name}, whose blocks have {elements}")
    return width // elements * nbytes


@lru_cache(maxsize=1)
def _ggml() -> Any:
    """The ggml library inside llama-cpp-python, or None. The package itself is not imported: that takes a second."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "lib" / _LIBRARY.get(sys.platform, _LIBRARY["linux"])
    try:
        library = ctypes.CDLL(str(path))
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
    except (OSError, AttributeError):
        return None
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    return library


@dataclass(frozen=True)
class GgmlCodec(Codec):
    """The Codec of a quantized type of GGUF files. Files made with an importance matrix can be patched too."""

    name: str
    span = 32
    """Numbers that share a scale, in most types."""

    @property
    def bits(self) -> float:
        """Bits per number, scales included."""
        elements, nbytes = block(self.name)
        return 8 * nbytes / elements

    @property
    def steps(self) -> int:
        """Steps between the smallest and the largest value of a block."""
        return _STEPS.get(self.name, 15)

    def require(self) -> None:
        """Checks that rows can be quantized to the type on this machine.

        Raises:
            QuantizationError: They cannot; the advice says what to do.
        """
        library, code = _ggml(), _type(self.name)
        if self.name in _NEEDS_IMATRIX or (library is not None and library.ggml_quantize_requires_imatrix(int(code))):
            raise QuantizationError(
                f"rows of type {self.name} can only be quantized with an importance matrix, which is not in the file",
                advice="Patch the float model and quantize it anew, or load an adapter: nestpatch export PACK --to gguf-lora",
            )
        if library is None:
            try:
                gguf_module("quants").quantize(np.zeros((1, block(self.name)[0]), np.float32), code)
            except NotImplementedError:
                reason = f"quantizing rows to {self.name} needs llama.cpp's library"
                raise QuantizationError(reason, advice="pip install 'nestpatch[llama]'") from None

    def encode(self, rows: FloatArray) -> Blocks:
        """Quantizes rows.

        Args:
            rows: float32 [rows, width].

        Returns:
            uint8 [rows, row_bytes].

        Raises:
            QuantizationError: Rows cannot be quantized to the type on this machine.
        """
        self.require()
        rows = np.ascontiguousarray(rows, np.float32)
        library = _ggml()
        if library is None:
            found: Blocks = gguf_module("quants").quantize(rows, _type(self.name)).view(np.uint8).reshape(len(rows), -1)
            return found
        out, number = np.empty((len(rows), row_bytes(self.name, rows.shape[1])), np.uint8), int(_type(self.name))

        def quantize(part: slice) -> None:
            source, target = rows[part], out[part]
            written = library.ggml_quantize_chunk(number, source.ctypes.data, target.ctypes.data, 0, *source.shape, None)
            if written != target.nbytes:
                raise QuantizationError(f"ggml wrote {written} bytes of {self.name} instead of {target.nbytes}")

        in_parts(quantize, len(rows), _WORTHWHILE // max(1, rows.shape[1]))
        return out

    def decode(self, blocks: Blocks) -> FloatArray:
        """Dequantizes rows.

        Args:
            blocks: uint8 [rows, row_bytes].

        Returns:
            float32 [rows, width].

        Raises:
            QuantizationError: The type cannot be decoded here.
        """
        try:
            found: FloatArray = gguf_module("quants").dequantize(np.ascontiguousarray(blocks), _type(self.name))
        except NotImplementedError:
            raise QuantizationError(f"rows of type {self.name} cannot be read here") from None
        return found.astype(np.float32, copy=False)


def codec(name: str) -> Codec:
    """How a tensor type of GGUF files stores rows.

    Args:
        name: The tensor type; unknown names are rejected when rows are encoded or decoded.

    Returns:
        Its codec: plain numbers for the float types that nestpatch patches, blocks for all others.
    """
    return FloatCodec(name) if name in DTYPES else GgmlCodec(name)


AUTO = "AUTO"
"""Every tensor keeps the dtype of the checkpoint."""
DIRECT = ("F32", "F16", "BF16", "Q8_0")
QUANTIZED = (
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_1", "Q5_K_S", "Q5_K_M", "Q6_K",
    "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
"""Mixtures of tensor types, which llama.cpp chooses tensor by tensor."""
NEED_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S")
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "FP32": "F32", "FP16": "F16"}
"""As in llama.cpp's own tool."""


@dataclass(frozen=True)
class FileType:
    """The type that the weights of an exported GGUF file get, as `file_type` returns it."""

    name: str
    """One of DIRECT or QUANTIZED, or AUTO."""
    direct: bool
    """Whether nestpatch writes it itself; llama.cpp quantizes the others."""


def file_type(name: str) -> FileType:
    """Parses the name of a file type.

    Args:
        name: In upper or lower case, with "-" or "_", such as "q4-k-m".

    Returns:
        The type.

    Raises:
        DataError: There is no such type; the advice lists them.
        QuantizationError: The type needs an importance matrix.
    """
    upper = name.upper().replace("-", "_")
    known = ALIASES.get(upper, upper)
    if known in NEED_IMATRIX:
        raise QuantizationError(
            f"{known} needs an importance matrix, which is measured by running the model on text",
            advice="Export to bf16 and use llama.cpp's llama-imatrix and llama-quantize, or choose IQ3_S, Q3_K_M or larger.",
        )
    if known != AUTO and known not in DIRECT + QUANTIZED:
        close = get_close_matches(upper, (*DIRECT, *QUANTIZED, *ALIASES), 1)
        question = f"Did you mean {close[0].lower()}? " if close else ""
        raise DataError(
            f"{name!r} is not a type of GGUF files", advice=f"{question}Known types: auto, {', '.join(DIRECT + QUANTIZED)}."
        )
    return FileType(known, direct=known not in QUANTIZED)


def code(name: str) -> int:
    """The number of a file type in GGUF files (general.file_type).

    Args:
        name: The type, such as "F32" or "Q4_K_M".

    Returns:
        Its number in llama.cpp's `llama_ftype`.

    Raises:
        KeyError: There is no such type; `file_type` checks names that users give.
    """
    return int(gguf_module("constants").LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"])
