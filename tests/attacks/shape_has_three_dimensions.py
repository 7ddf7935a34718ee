"""A delta is no matrix."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_entry

ERROR = PackFormatError
SAYS = "has an impossible shape"


def attack(good: bytes) -> bytes:
    return with_entry(good, "delta", shape=[1, 2, 16])
