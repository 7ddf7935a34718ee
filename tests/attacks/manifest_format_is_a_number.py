"""The format is a number."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_manifest

ERROR = PackFormatError
SAYS = "the manifest has a 'format' that is not of type str"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: manifest.update(format=1))
