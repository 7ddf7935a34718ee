"""No bytes at all."""

from nestpatch.errors import PackFormatError

ERROR = PackFormatError
SAYS = "the file has 0 bytes: too short for a pack"


def attack(good: bytes) -> bytes:
    return b""
