"""One byte behind the last tensor."""

from nestpatch.errors import PackFormatError

ERROR = PackFormatError
SAYS = "bytes of tensors, the file holds"


def attack(good: bytes) -> bytes:
    return good + b"\0"
