"""A detector without a threshold."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_detector

ERROR = PackFormatError
SAYS = "the manifest's detector lacks the field 'threshold'"


def attack(good: bytes) -> bytes:
    return with_detector(good, drop="threshold")
