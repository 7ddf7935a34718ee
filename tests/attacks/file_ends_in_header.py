"""The download stopped in the header."""

from nestpatch.errors import PackFormatError

ERROR = PackFormatError
SAYS = "the file ends inside its header: 100 bytes"


def attack(good: bytes) -> bytes:
    return good[:100]
