"""A field is missing."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_manifest

ERROR = PackFormatError
SAYS = "the manifest lacks the field 'license'"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: manifest.pop("license"))
