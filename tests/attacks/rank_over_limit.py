"""A rank that makes a merge slow and saves nothing."""

import numpy as np

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_array, with_factors

ERROR = PackContentError
SAYS = "has rank 257; 256 is allowed"


def attack(good: bytes) -> bytes:
    wide = with_array(good, "delta", lambda delta: np.resize(delta, (257, delta.shape[1])))
    return with_factors(wide, np.ones((9, 257), np.float32))
