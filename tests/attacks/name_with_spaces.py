"""A name that ends in a space."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_manifest

ERROR = PackContentError
SAYS = "is not a pack name"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: manifest.update(name="safe "))
