"""A tensor is described by a list."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import first_tensor, with_header

ERROR = PackFormatError
SAYS = "is not described by an object"


def attack(good: bytes) -> bytes:
    return with_header(good, lambda header: header.update({f"{first_tensor(header)}:rows": []}))
