"""0.001 written as 1e-3."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_manifest_text

ERROR = PackFormatError
SAYS = "the manifest is not canonical JSON"


def attack(good: bytes) -> bytes:
    return with_manifest_text(good, lambda text: text.replace('"rate":0.001', '"rate":1e-3'))
