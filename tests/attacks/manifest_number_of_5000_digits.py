"""A number that takes quadratic time to read."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_manifest_text

ERROR = PackFormatError
SAYS = "the manifest is not valid JSON"


def attack(good: bytes) -> bytes:
    return with_manifest_text(good, lambda text: text.replace('"rate":0.001', '"rate":' + "9" * 5000))
