"""The last byte is missing."""

from nestpatch.errors import PackFormatError

ERROR = PackFormatError
SAYS = "bytes of tensors, the file holds"


def attack(good: bytes) -> bytes:
    return good[:-1]
