"""The header claims more bytes than any disk holds."""

from nestpatch.errors import PackFormatError

ERROR = PackFormatError
SAYS = "the header claims 18446744073709551615 bytes"


def attack(good: bytes) -> bytes:
    return b"\xff" * 8 + good[8:]
