"""Factors in a type that is no float."""

import numpy as np

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_factors

ERROR = PackContentError
SAYS = ":factors has dtype int32"


def attack(good: bytes) -> bytes:
    return with_factors(good, np.ones((9, 2), np.int32))
