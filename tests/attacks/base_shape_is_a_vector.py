"""A base tensor that has no rows."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_base

ERROR = PackContentError
SAYS = "impossible shape [16]"


def attack(good: bytes) -> bytes:
    return with_base(good, shape=[16])
