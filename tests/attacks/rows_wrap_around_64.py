"""Row numbers whose 64-bit differences are positive, though the last row is negative."""

import numpy as np

from nestpatch.errors import PackContentError
from tests.attacks.tools import Arrays, first_tensor, with_arrays

ERROR = PackContentError
SAYS = "rows are unsorted or repeated"


def attack(good: bytes) -> bytes:
    return with_arrays(good, wrap)


def wrap(arrays: Arrays) -> None:
    name = f"{first_tensor(arrays)}:rows"
    arrays[name] = np.array([*arrays[name][:-1], -(2**63)], np.int64)
