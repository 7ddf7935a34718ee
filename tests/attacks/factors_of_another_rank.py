"""More factors than vectors."""

import numpy as np

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_factors

ERROR = PackContentError
SAYS = ":factors has shape [9, 3]; rows and delta need [9, 2]"


def attack(good: bytes) -> bytes:
    return with_factors(good, np.ones((9, 3), np.float32))
