"""A weight in another type than F32."""

import numpy as np

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_detector

ERROR = PackContentError
SAYS = "detector:weight has dtype float16; it must be F32"


def attack(good: bytes) -> bytes:
    return with_detector(good, np.ones(16, np.float16))
