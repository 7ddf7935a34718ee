"""A pack that changes nothing."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_arrays

ERROR = PackContentError
SAYS = "the pack changes nothing"


def attack(good: bytes) -> bytes:
    return with_arrays(good, lambda arrays: arrays.clear())
