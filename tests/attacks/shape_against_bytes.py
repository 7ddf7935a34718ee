"""A shape needs fewer bytes than the tensor has."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_entry

ERROR = PackFormatError
SAYS = "shape and dtype need 60 bytes, it has 64"


def attack(good: bytes) -> bytes:
    return with_entry(good, "delta", shape=[2, 15])
