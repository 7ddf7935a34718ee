"""A number that takes quadratic time to read."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_header_text

ERROR = PackFormatError
SAYS = "the header is not valid JSON"


def attack(good: bytes) -> bytes:
    return with_header_text(good, lambda text: text.replace('"data_offsets":[', '"data_offsets":[' + "9" * 5000, 1))
