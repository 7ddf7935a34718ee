"""The next version of the format."""

from nestpatch.errors import PackTooNewError
from tests.attacks.tools import with_manifest

ERROR = PackTooNewError
SAYS = "the pack has format 'nest/3'"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: manifest.update(format="nest/3"))
