"""Models whose matrices are kept in 8 or 4 bits in memory, by bitsandbytes (arXiv 2208.07339, arXiv 2305.14314)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nestpatch.errors import MissingExtraError
from nestpatch.rows import FloatArray
from nestpatch.runtimes.sharded import whole

if TYPE_CHECKING:
    import torch
    from torch import nn

_ERROR = 0.3
"""Norm of the error by which rows may differ from those on disk, of their norm: 4 bits give 0.1, other rows 1.4."""


def loading_options(load_in: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` that keep the matrices of the layers in few bits.

    Args:
        load_in: "none", "8bit" or "4bit".
        device: Where the model computes.
        dtype: In what it computes.

    Returns:
        The arguments; none for "none".

    Raises:
        MissingExtraError: bitsandbytes is not installed, or too old for transformers.
    """
    if load_in == "none":
        return {}
    from transformers import BitsAndBytesConfig
    from transformers.utils.import_utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise MissingExtraError("quantize", f"load_in={load_in} (module bitsandbytes)", instead="use load_in=none")
    if load_in == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_gradients(model: nn.Module) -> None:
    """Puts the quantized layers, and these alone, in training mode: in evaluation mode bitsandbytes stores 4-bit weights for
    some CPUs in a form that gives no gradient, and rounds the activations of 8-bit layers.

    Args:
        model: A loaded model, in evaluation mode.
    """
    for layer in quantized_layers(model).values():
        layer.training = True


def quantized_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Finds the layers whose weights are stored in few bits.

    Args:
        model: A loaded model.

    Returns:
        Name of the weight -> layer.
    """
    from torch import nn

    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {f"{name}.weight": layer for name, layer in layers if is_quantized(layer)}


def is_quantized(linear: nn.Linear) -> bool:
    """Whether the weight is stored in few bits.

    Args:
        linear: A layer of a loaded model.
    """
    return not linear.weight.is_floating_point()


def float_weight(linear: Any) -> torch.Tensor:
    """The weight with which a layer computes.

    Args:
        linear: A layer of a loaded model, quantized or not.

    Returns:
        [out, in], of a type of floating point.
    """
    import torch

    weight: torch.Tensor = whole(linear.weight.detach())
    if not is_quantized(linear):
        return weight
    with torch.no_grad():  # whatever the layer stores, this is what it computes with
        columns: torch.Tensor = linear(torch.eye(linear.in_features, device=weight.device))
        return (columns if linear.bias is None else columns - linear.bias).T


def resembles(stored: FloatArray, loaded: torch.Tensor) -> bool:
    """Whether rows of a quantized layer come from rows on disk.

    Args:
        stored: [rows, in], decoded.
        loaded: The same rows of `float_weight`.

    Returns:
        True when they differ by no more than the rounding.
    """
    gap = loaded.float().cpu().numpy() - stored
    return bool(np.linalg.norm(gap) <= _ERROR * np.linalg.norm(stored))
