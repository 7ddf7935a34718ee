"""The header begins with a byte order mark."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_header_text

ERROR = PackFormatError
SAYS = "the header is not valid JSON"


def attack(good: bytes) -> bytes:
    return with_header_text(good, lambda text: "\ufeff" + text)
