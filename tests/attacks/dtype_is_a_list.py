"""A dtype that cannot even be looked up."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_entry

ERROR = PackFormatError
SAYS = "has dtype ['BF16']"


def attack(good: bytes) -> bytes:
    return with_entry(good, "delta", dtype=["BF16"])
