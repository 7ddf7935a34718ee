"""Deltas in one dimension."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_array

ERROR = PackContentError
SAYS = ":delta has shape [32]"


def attack(good: bytes) -> bytes:
    return with_array(good, "delta", lambda delta: delta.ravel())
