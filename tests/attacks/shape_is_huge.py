"""A shape beyond 63 bits."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_entry

ERROR = PackFormatError
SAYS = "has an impossible shape"


def attack(good: bytes) -> bytes:
    return with_entry(good, "delta", shape=[2**63, 16])
