"""A version that ends in a line break."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_manifest

ERROR = PackContentError
SAYS = "is not semver"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: manifest.update(version="1.0.0\n"))
