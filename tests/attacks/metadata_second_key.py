"""A second metadata key, which other readers would show."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_header

ERROR = PackFormatError
SAYS = "its metadata must hold the key nest and no other"


def attack(good: bytes) -> bytes:
    return with_header(good, lambda header: header["__metadata__"].update(format="pt"))
