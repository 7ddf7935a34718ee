"""NaN in a delta."""

import numpy as np

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_array

ERROR = PackContentError
SAYS = ":delta holds NaN or infinity"


def attack(good: bytes) -> bytes:
    return with_array(good, "delta", poison)


def poison(delta: np.ndarray) -> np.ndarray:
    delta[0, 3] = np.nan
    return delta
