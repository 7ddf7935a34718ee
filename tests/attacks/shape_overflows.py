"""A shape whose product is 0 in 64 bits."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_entry

ERROR = PackFormatError
SAYS = "shape and dtype need"


def attack(good: bytes) -> bytes:
    return with_entry(good, "delta", shape=[2**62, 2**62])
