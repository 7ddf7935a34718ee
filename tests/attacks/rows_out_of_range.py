"""The last row is beyond the matrix."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_array

ERROR = PackContentError
SAYS = "row 24 is out of range; the matrix has 24"


def attack(good: bytes) -> bytes:
    return with_array(good, "rows", lambda rows: [*rows[:-1], 24])
