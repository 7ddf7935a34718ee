"""A weight of two dimensions."""

import numpy as np

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_detector

ERROR = PackContentError
SAYS = "detector:weight has shape [4, 4]"


def attack(good: bytes) -> bytes:
    return with_detector(good, np.ones((4, 4), np.float32))
