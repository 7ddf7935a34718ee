"""The download stopped in the first eight bytes."""

from nestpatch.errors import PackFormatError

ERROR = PackFormatError
SAYS = "the file has 7 bytes: too short for a pack"


def attack(good: bytes) -> bytes:
    return good[:7]
