"""A tensor has no offsets."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_entry

ERROR = PackFormatError
SAYS = "has impossible data_offsets"


def attack(good: bytes) -> bytes:
    return with_entry(good, "rows", data_offsets=None)
