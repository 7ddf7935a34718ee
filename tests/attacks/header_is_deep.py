"""The header nests deeper than a recursive reader can follow."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import join

ERROR = PackFormatError
SAYS = "the header is not valid JSON"


def attack(good: bytes) -> bytes:
    return join('{"a":' * 100_000 + "1" + "}" * 100_000, b"")
