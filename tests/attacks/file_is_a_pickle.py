"""A torch checkpoint (a zip of pickles) given as the patch."""

from nestpatch.errors import PackFormatError

ERROR = PackFormatError
SAYS = "the header claims"


def attack(good: bytes) -> bytes:
    return b"PK\x03\x04\x00\x00\x08\x08" + bytes(500)
