"""A tensor of both kinds: which of them would count?"""

import numpy as np

from nestpatch.errors import PackContentError
from tests.attacks.tools import Arrays, first_tensor, with_arrays

ERROR = PackContentError
SAYS = "has both clusters and factors"


def attack(good: bytes) -> bytes:
    def change(arrays: Arrays) -> None:
        name = first_tensor(arrays)
        arrays[f"{name}:factors"] = np.ones((9, 2), np.float32)

    return with_arrays(good, change)
