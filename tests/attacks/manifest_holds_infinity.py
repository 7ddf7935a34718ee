"""A number so large that reading makes it infinite."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_manifest_text

ERROR = PackContentError
SAYS = "the manifest cannot be written as JSON"


def attack(good: bytes) -> bytes:
    return with_manifest_text(good, lambda text: text.replace('"rate":0.001', '"rate":1e999'))
