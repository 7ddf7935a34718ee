"""2.0 is no length."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_entry

ERROR = PackFormatError
SAYS = "has an impossible shape"


def attack(good: bytes) -> bytes:
    return with_entry(good, "delta", shape=[2.0, 16])
