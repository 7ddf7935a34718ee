"""A delta longer than a row of the matrix."""

import numpy as np

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_array

ERROR = PackContentError
SAYS = "deltas are 17 wide, the matrix 16"


def attack(good: bytes) -> bytes:
    return with_array(good, "delta", lambda delta: np.hstack([delta, delta[:, :1]]))
