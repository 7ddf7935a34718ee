"""A version with a number that Python does not read."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_manifest

ERROR = PackContentError
SAYS = "has 5004 characters; 64 are allowed"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: manifest.update(version="9" * 5000 + ".0.0"))
