"""64 more spaces behind the header."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import join, split

ERROR = PackFormatError
SAYS = "not in canonical form"


def attack(good: bytes) -> bytes:
    text, body = split(good)
    return join(text + " " * 64, body)
