"""One entry has two shapes; the last one would win."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_header_text

ERROR = PackFormatError
SAYS = "the header has the duplicate key 'shape'"


def attack(good: bytes) -> bytes:
    return with_header_text(good, lambda text: text.replace('"shape":[', '"shape":[1],"shape":[', 1))
