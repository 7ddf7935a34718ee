"""A weight of a detector that the manifest does not describe."""

import numpy as np

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_arrays

ERROR = PackContentError
SAYS = "there is a tensor detector:weight, and the manifest describes no detector"


def attack(good: bytes) -> bytes:
    return with_arrays(good, lambda arrays: arrays.update({"detector:weight": np.ones(4, np.float32)}))
