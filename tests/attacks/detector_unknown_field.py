"""A field of the detector that this version does not know."""

from nestpatch.errors import PackTooNewError
from tests.attacks.tools import with_detector

ERROR = PackTooNewError
SAYS = "the manifest's detector has the unknown field 'scale'"


def attack(good: bytes) -> bytes:
    return with_detector(good, scale=1.0)
