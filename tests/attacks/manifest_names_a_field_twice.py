"""Two versions; the last one would win."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_manifest_text

ERROR = PackFormatError
SAYS = "the manifest has the duplicate key 'version'"


def attack(good: bytes) -> bytes:
    return with_manifest_text(good, lambda text: f'{text[:-1]},"version":"9.0.0"}}')
