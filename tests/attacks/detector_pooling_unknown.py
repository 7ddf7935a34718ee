"""A pooling that no reader computes."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_detector

ERROR = PackContentError
SAYS = "the detector's pooling is 'median'; known are last, mean, max"


def attack(good: bytes) -> bytes:
    return with_detector(good, pooling="median")
