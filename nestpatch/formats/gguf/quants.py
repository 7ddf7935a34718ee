"""The arithmetic of quantized rows: float32 to blocks of a GGUF type and back.

llama.cpp's own ggml library does it where llama-cpp-python has brought it along; the `gguf` package does the types that it
has, with the same bytes. Every row is quantized by itself, so a few rows give the bytes that the whole tensor would give.
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
from nestpatch.formats.codec import Blocks
from nestpatch.rows import DTYPES, FloatArray

NEEDS_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
"""Types whose quantizer wants an importance matrix; some of them end the process when they get none."""
STEPS = {"Q2_K": 3, "TQ1_0": 2, "TQ2_0": 2, "Q3_K": 7, "IQ3_S": 7, "Q5_0": 31, "Q5_1": 31, "Q5_K": 31, "Q6_K": 63, "Q8_0": 254}
"""Steps between the smallest and the largest value of a block; 15 for all other types."""
_LIBRARY = {"linux": "libggml-base.so", "darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}


def _type(name: str) -> Any:
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType[name]
    except KeyError:
        raise QuantizationError(f"{name} is no tensor type of GGUF files") from None


def type_name(code: int) -> str | None:
    """The name of a type by its number in GGUF files, or None."""
    from gguf import GGMLQuantizationType

    try:
        return str(GGMLQuantizationType(code).name)
    except ValueError:
        return None


def is_quantized(name: str) -> bool:
    """Whether that is a type of GGUF files which holds numbers in blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    code = getattr(GGMLQuantizationType, name, None)
    return code is not None and GGML_QUANT_SIZES[code][0] > 1


@lru_cache(maxsize=64)
def block(name: str) -> tuple[int, int]:
    """(elements, bytes) of one block of a type. Raises QuantizationError for unknown names."""
    from gguf import GGML_QUANT_SIZES

    elements, nbytes = GGML_QUANT_SIZES[_type(name)]
    return int(elements), int(nbytes)


def row_bytes(name: str, width: int) -> int:
    """Bytes of a row of `width` elements. Raises QuantizationError where blocks do not fill it exactly."""
    elements, nbytes = block(name)
    if width % elements:
        raise QuantizationError(f"rows of {width} elements do not fit into {name}, whose blocks have {elements}")
    return width // elements * nbytes


@lru_cache(maxsize=1)
def _ggml() -> Any:
    """llama.cpp's ggml library inside llama-cpp-python, or None. The package itself is not imported: that takes a second."""
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


def require_quantizer(name: str) -> None:
    """Raises QuantizationError, with the way out, when rows cannot be quantized to a type here."""
    library, code = _ggml(), _type(name)
    if name in NEEDS_IMATRIX or (library is not None and library.ggml_quantize_requires_imatrix(int(code))):
        raise QuantizationError(
            f"rows of type {name} can only be quantized with an importance matrix, which is not in the file",
            advice="Patch the float model and quantize it anew, or load an adapter: nestpatch export PATCH --to gguf-lora",
        )
    if library is None:
        import gguf

        try:
            gguf.quantize(np.zeros((1, block(name)[0]), np.float32), code)
        except NotImplementedError:
            reason = f"quantizing rows to {name} needs llama.cpp's library"
            raise QuantizationError(reason, advice="pip install 'nestpatch[llama]'") from None


def quantize(rows: FloatArray, name: str) -> Blocks:
    """float32 [rows, width] -> blocks, uint8 [rows, row_bytes]. Also for the float types.

    Raises QuantizationError when that cannot be done here.
    """
    if name in DTYPES:
        return rows.astype(DTYPES[name]).view(np.uint8)
    require_quantizer(name)
    rows = np.ascontiguousarray(rows, np.float32)
    library = _ggml()
    if library is None:
        import gguf

        found: Blocks = gguf.quantize(rows, _type(name)).view(np.uint8).reshape(len(rows), -1)
        return found
    out = np.empty((len(rows), row_bytes(name, rows.shape[1])), np.uint8)
    written = library.ggml_quantize_chunk(int(_type(name)), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None)
    if written != out.nbytes:
        raise QuantizationError(f"ggml wrote {written} bytes of {name} instead of {out.nbytes}")
    return out


def dequantize(blocks: Blocks, name: str) -> FloatArray:
    """Blocks, uint8 [rows, row_bytes] -> float32 [rows, width]. Also for the float types.

    Raises QuantizationError for types that hold no numbers of this kind.
    """
    raw = np.ascontiguousarray(blocks)
    if name in DTYPES:
        plain: FloatArray = raw.view(DTYPES[name]).astype(np.float32)
        return plain
    import gguf

    try:
        found: FloatArray = gguf.dequantize(raw, _type(name)).astype(np.float32, copy=False)
    except NotImplementedError:
        raise QuantizationError(f"rows of type {name} cannot be read here") from None
    return found


@dataclass(frozen=True)
class GgmlCodec:
    """A quantized type of GGUF files. Files made with an importance matrix are taken too: their rows are the base as well."""

    name: str
    span = 32
    """In most types."""
    witnesses = 0

    @property
    def bits(self) -> float:
        """Per number, scales included."""
        elements, nbytes = block(self.name)
        return 8 * nbytes / elements

    @property
    def steps(self) -> int:
        """Between the smallest and the largest value of a block."""
        return STEPS.get(self.name, 15)

    def require(self) -> None:
        """Raises QuantizationError, with the way out, when rows cannot be quantized to the type here."""
        require_quantizer(self.name)

    def encode(self, rows: FloatArray) -> Blocks:
        """As `quantize`."""
        return quantize(rows, self.name)

    def decode(self, blocks: Blocks) -> FloatArray:
        """As `dequantize`."""
        return dequantize(blocks, self.name)

    def fitted(self, origin: FloatArray, stored: Blocks) -> GgmlCodec:  # noqa: ARG002 - the protocol's signature
        """Every quantizer's rows are taken."""
        return self


AUTO = "AUTO"
"""Every tensor keeps the dtype that the checkpoint stores it in."""
DIRECT = ("F32", "F16", "BF16", "Q8_0")
QUANTIZED = (
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_1", "Q5_K_S", "Q5_K_M", "Q6_K",
    "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
"""Mixtures of types that llama.cpp chooses tensor by tensor."""
NEED_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S")
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "FP32": "F32", "FP16": "F16"}
"""As llama.cpp's own tool has them."""


@dataclass(frozen=True)
class FileType:
    """What the weights of a GGUF file are to be."""

    name: str
    """One of DIRECT or QUANTIZED, or AUTO."""

    @property
    def direct(self) -> bool:
        """Whether it is written here."""
        return self.name not in QUANTIZED


def file_type(name: str) -> FileType:
    """A type by its name, in any case. Raises DataError for unknown ones, QuantizationError for those that need an imatrix."""
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
            f"{name!r} is no type of a GGUF file", advice=f"{question}Known types: auto, {', '.join(DIRECT + QUANTIZED)}."
        )
    return FileType(known)


def code(name: str) -> int:
    """llama.cpp's number of a file type."""
    from gguf import LlamaFileType

    return int(LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"])
