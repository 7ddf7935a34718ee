"""A threshold that is written as a whole number: two files would hold the same pack."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_detector

ERROR = PackFormatError
SAYS = "the manifest's detector has a 'threshold' that is not of type float"


def attack(good: bytes) -> bytes:
    return with_detector(good, threshold=1)
