"""A tensor with deltas and no rows."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_array

ERROR = PackContentError
SAYS = ":rows has shape [0]"


def attack(good: bytes) -> bytes:
    for part in ("rows", "cluster", "sketch"):
        good = with_array(good, part, lambda array: array[:0])
    return good
