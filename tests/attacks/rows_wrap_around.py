"""Row numbers whose 32-bit differences are positive, though the last row is negative."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_array

ERROR = PackContentError
SAYS = "rows are unsorted or repeated"


def attack(good: bytes) -> bytes:
    return with_array(good, "rows", lambda rows: [*rows[:-1], -(2**31)])
