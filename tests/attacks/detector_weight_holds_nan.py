"""NaN in the weight: no score would be above the threshold."""

import numpy as np

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_detector

ERROR = PackContentError
SAYS = "detector:weight holds NaN or infinity"


def attack(good: bytes) -> bytes:
    return with_detector(good, np.full(16, np.nan, np.float32))
