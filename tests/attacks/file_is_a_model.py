"""A plain safetensors model given as the patch."""

import numpy as np
from safetensors.numpy import save

from nestpatch.errors import PackFormatError

ERROR = PackFormatError
SAYS = "this safetensors file is not a pack"


def attack(good: bytes) -> bytes:
    return save({"model.norm.weight": np.ones(16, np.float32)}, {"format": "pt"})
