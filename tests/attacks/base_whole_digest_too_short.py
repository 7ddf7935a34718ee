"""A digest cut short."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_base

ERROR = PackContentError
SAYS = "a tensor's sha256 is not a SHA-256"


def attack(good: bytes) -> bytes:
    return with_base(good, sha256="0" * 63)
