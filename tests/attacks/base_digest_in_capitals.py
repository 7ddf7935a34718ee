"""A digest with a second spelling."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_base

ERROR = PackContentError
SAYS = "a tensor's rows_sha256 is not a SHA-256"


def attack(good: bytes) -> bytes:
    return with_base(good, rows_sha256="A" * 64)
