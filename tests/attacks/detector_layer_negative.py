"""A layer below the first."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_detector

ERROR = PackContentError
SAYS = "the detector's layer is out of range: -1"


def attack(good: bytes) -> bytes:
    return with_detector(good, layer=-1)
