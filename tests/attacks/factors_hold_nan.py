"""NaN in a factor."""

import numpy as np

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_factors

ERROR = PackContentError
SAYS = ":factors holds NaN or infinity"


def attack(good: bytes) -> bytes:
    factors = np.ones((9, 2), np.float32)
    factors[3, 1] = np.nan
    return with_factors(good, factors)
