"""A second manifest hides behind the first."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_header_text

ERROR = PackFormatError
SAYS = "the header has the duplicate key '__metadata__'"


def attack(good: bytes) -> bytes:
    return with_header_text(good, lambda text: '{"__metadata__":{"nest":"{}"},' + text[1:])
