"""The types of GGUF files, by llama.cpp's names: which are written here, which by llama.cpp, which not at all."""

from __future__ import annotations

from dataclasses import dataclass

from nestpatch.errors import DataError, QuantizationError

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
        raise DataError(f"{name!r} is no type of a GGUF file", advice=f"Known types: auto, {', '.join(DIRECT + QUANTIZED)}.")
    return FileType(known)


def code(name: str) -> int:
    """llama.cpp's number of a file type."""
    from gguf import LlamaFileType

    return int(LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"])
