"""The padding is as long as it should be, but made of tabs."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import join, split

ERROR = PackFormatError
SAYS = "not in canonical form"


def attack(good: bytes) -> bytes:
    text, body = split(good)
    return join(text, body, padding=b"\t" * (len(good) - 8 - len(text.encode()) - len(body)))
