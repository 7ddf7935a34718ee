"""The header is UTF-16, which a JSON reader may guess from bytes."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_header_text

ERROR = PackFormatError
SAYS = "the header is not valid JSON"


def attack(good: bytes) -> bytes:
    return with_header_text(good, lambda text: text.encode("utf-16-le"))
