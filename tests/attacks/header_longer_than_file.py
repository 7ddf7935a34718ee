"""The header claims the whole file and eight bytes more."""

import struct

from nestpatch.errors import PackFormatError

ERROR = PackFormatError
SAYS = "the file ends inside its header"


def attack(good: bytes) -> bytes:
    return struct.pack("<Q", len(good)) + good[8:]
