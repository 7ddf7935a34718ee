"""The header is JSON, but no object."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import join

ERROR = PackFormatError
SAYS = "the header is not a JSON object"


def attack(good: bytes) -> bytes:
    return join("[]", b"")
