"""A text where a list belongs."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_manifest

ERROR = PackFormatError
SAYS = "the manifest has a 'tags' that is not of type list"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: manifest.update(tags="safe"))
