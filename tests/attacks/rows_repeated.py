"""A row that would be changed twice."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_array

ERROR = PackContentError
SAYS = "rows are unsorted or repeated"


def attack(good: bytes) -> bytes:
    return with_array(good, "rows", lambda rows: [rows[0], rows[0], *rows[2:]])
