"""A dtype that no pack may hold."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_entry

ERROR = PackFormatError
SAYS = "has dtype 'F64'"


def attack(good: bytes) -> bytes:
    return with_entry(good, "delta", dtype="F64")
