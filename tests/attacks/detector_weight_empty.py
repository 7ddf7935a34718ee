"""A weight without numbers."""

import numpy as np

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_detector

ERROR = PackContentError
SAYS = "detector:weight has shape [0]"


def attack(good: bytes) -> bytes:
    return with_detector(good, np.ones(0, np.float32))
