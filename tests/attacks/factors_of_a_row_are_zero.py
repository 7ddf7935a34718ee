"""A row is listed that does not change: the same change would have many files."""

import numpy as np

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_factors

ERROR = PackContentError
SAYS = "does not change: its factors are zero"


def attack(good: bytes) -> bytes:
    factors = np.ones((9, 2), np.float32)
    factors[4] = (0, -0.0)
    return with_factors(good, factors)
