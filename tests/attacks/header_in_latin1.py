"""The header is no UTF-8."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_header_text

ERROR = PackFormatError
SAYS = "the header is not valid JSON"


def attack(good: bytes) -> bytes:
    return with_header_text(good, lambda text: text.encode("latin-1"))
