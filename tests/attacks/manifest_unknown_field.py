"""A field of a newer format."""

from nestpatch.errors import PackTooNewError
from tests.attacks.tools import with_manifest

ERROR = PackTooNewError
SAYS = "the manifest has the unknown field 'expires'"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: manifest.update(expires="2027-01-01"))
