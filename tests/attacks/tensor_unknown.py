"""A fifth array, of a newer format."""

import numpy as np

from nestpatch.errors import PackTooNewError
from tests.attacks.tools import first_tensor, with_arrays

ERROR = PackTooNewError
SAYS = "unknown tensor 'model.layers.0.mlp.gate_proj.weight:bias'"


def attack(good: bytes) -> bytes:
    return with_arrays(good, lambda arrays: arrays.update({f"{first_tensor(arrays)}:bias": np.zeros(4, np.float32)}))
