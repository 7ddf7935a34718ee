"""NaN in a sketch, which likens to nothing."""

import numpy as np

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_array

ERROR = PackContentError
SAYS = ":sketch holds NaN or infinity"


def attack(good: bytes) -> bytes:
    return with_array(good, "sketch", poison)


def poison(sketch: np.ndarray) -> np.ndarray:
    sketch[0, 0] = np.nan
    return sketch
