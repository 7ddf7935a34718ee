"""NUL bytes behind the header."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import join, split

ERROR = PackFormatError
SAYS = "the header is not valid JSON"


def attack(good: bytes) -> bytes:
    text, body = split(good)
    return join(text, body, padding=b"\0" * 64)
