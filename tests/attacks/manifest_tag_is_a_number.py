"""A number among the tags."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_manifest

ERROR = PackFormatError
SAYS = "the manifest's tags must be a list of strings"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: manifest.update(tags=[1]))
