"""Row numbers in two dimensions."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_array

ERROR = PackContentError
SAYS = ":rows has shape [9, 1]"


def attack(good: bytes) -> bytes:
    return with_array(good, "rows", lambda rows: rows.reshape(9, 1))
