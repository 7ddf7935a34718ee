"""A bias that JSON reads as infinity."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_detector, with_manifest_text

ERROR = PackContentError
SAYS = "Out of range float values are not JSON compliant"


def attack(good: bytes) -> bytes:
    return with_manifest_text(with_detector(good), lambda text: text.replace('"bias":-0.5', '"bias":-1e999'))
