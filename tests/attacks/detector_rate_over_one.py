"""A detection rate over 1."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_detector

ERROR = PackContentError
SAYS = "the detector's detection_rate is 1.5, not between 0 and 1"


def attack(good: bytes) -> bytes:
    return with_detector(good, detection_rate=1.5)
