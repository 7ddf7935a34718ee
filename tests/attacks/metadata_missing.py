"""No metadata: not a pack."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_header

ERROR = PackFormatError
SAYS = "its metadata must hold the key nest and no other"


def attack(good: bytes) -> bytes:
    return with_header(good, lambda header: header.pop("__metadata__"))
