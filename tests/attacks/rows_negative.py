"""The first row is before the matrix."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_array

ERROR = PackContentError
SAYS = "row -1 is out of range"


def attack(good: bytes) -> bytes:
    return with_array(good, "rows", lambda rows: [-1, *rows[1:]])
