"""A shape holds NaN, which is no JSON."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_header_text

ERROR = PackFormatError
SAYS = "the header holds NaN"


def attack(good: bytes) -> bytes:
    return with_header_text(good, lambda text: text.replace('"shape":[', '"shape":[NaN,', 1))
