"""A layer that is true."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_detector

ERROR = PackFormatError
SAYS = "the manifest's detector has a 'layer' that is not of type int"


def attack(good: bytes) -> bytes:
    return with_detector(good, layer=True)
