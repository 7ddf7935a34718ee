"""Finite factors and vectors whose product is not."""

import numpy as np

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_array, with_factors

ERROR = PackContentError
SAYS = "may leave the range of float32"


def attack(good: bytes) -> bytes:
    huge = with_array(good, "delta", lambda delta: np.full_like(delta, 3e38))
    return with_factors(huge, np.full((9, 2), 2, np.float32))
