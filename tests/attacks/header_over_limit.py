"""The header is well-formed and padded to just over 1 MiB."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import join, split

ERROR = PackFormatError
SAYS = "the header claims 1048577 bytes; 1048576 are allowed"


def attack(good: bytes) -> bytes:
    text, body = split(good)
    return join(text, body, padding=b" " * ((1 << 20) + 1 - len(text.encode())))
