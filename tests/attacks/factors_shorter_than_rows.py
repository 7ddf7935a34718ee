"""The last row has no factors."""

import numpy as np

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_factors

ERROR = PackContentError
SAYS = ":factors has shape [8, 2]; rows and delta need [9, 2]"


def attack(good: bytes) -> bytes:
    return with_factors(good, np.ones((8, 2), np.float32))
