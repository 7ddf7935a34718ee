"""NaN among the facts of the method."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_manifest_text

ERROR = PackFormatError
SAYS = "the manifest holds NaN"


def attack(good: bytes) -> bytes:
    return with_manifest_text(good, lambda text: text.replace('"rate":0.001', '"rate":NaN'))
