"""A low-rank change in the format of clusters, where older readers would not know it."""

import numpy as np

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_factors

ERROR = PackContentError
SAYS = "nest/1 of the pack does not have what it holds: tensor 'model.layers.0.mlp.gate_proj.weight' has factors"


def attack(good: bytes) -> bytes:
    return with_factors(good, np.ones((9, 2), np.float32), named="nest/1")
