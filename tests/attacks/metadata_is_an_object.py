"""The manifest is an object instead of text."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_header

ERROR = PackFormatError
SAYS = "its metadata must hold the key nest and no other"


def attack(good: bytes) -> bytes:
    return with_header(good, lambda header: header.update(__metadata__={"nest": {}}))
