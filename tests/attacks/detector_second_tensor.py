"""A second array of the detector, of a newer format."""

import numpy as np

from nestpatch.errors import PackTooNewError
from tests.attacks.tools import with_arrays, with_detector

ERROR = PackTooNewError
SAYS = "unknown tensor 'detector:bias'"


def attack(good: bytes) -> bytes:
    return with_arrays(with_detector(good), lambda arrays: arrays.update({"detector:bias": np.ones(1, np.float32)}))
