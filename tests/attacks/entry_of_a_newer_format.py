"""A tensor has a field that this version does not know."""

from nestpatch.errors import PackTooNewError
from tests.attacks.tools import with_entry

ERROR = PackTooNewError
SAYS = "has the unknown field 'compression'"


def attack(good: bytes) -> bytes:
    return with_entry(good, "delta", compression="zstd")
