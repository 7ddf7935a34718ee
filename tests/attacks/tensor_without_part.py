"""A tensor that is no part of anything."""

import numpy as np

from nestpatch.errors import PackTooNewError
from tests.attacks.tools import with_arrays

ERROR = PackTooNewError
SAYS = "unknown tensor 'payload'"


def attack(good: bytes) -> bytes:
    return with_arrays(good, lambda arrays: arrays.update(payload=np.zeros(4, np.float32)))
