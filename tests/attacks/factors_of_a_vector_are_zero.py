"""A vector that no row uses: a pack could carry anything in it."""

import numpy as np

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_factors

ERROR = PackContentError
SAYS = "1 of 2 deltas have no row: their factors are zero"


def attack(good: bytes) -> bytes:
    factors = np.ones((9, 2), np.float32)
    factors[:, 1] = 0
    return with_factors(good, factors)
