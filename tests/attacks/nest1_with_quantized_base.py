"""A quantized base tensor in the format of float bases, where older readers would take its digests for those of floats."""

import numpy as np

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_array, with_base

ERROR = PackContentError
SAYS = "nest/1 of the pack does not have what it holds: base tensor 'model.layers.0.mlp.gate_proj.weight' is quantized (Q8_0)"


def attack(good: bytes) -> bytes:
    wide = with_array(good, "delta", lambda delta: np.tile(delta, 2))
    return with_base(wide, dtype="Q8_0", shape=[24, 32])
