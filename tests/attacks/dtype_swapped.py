"""Row numbers declared as floats of the same size."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_entry

ERROR = PackContentError
SAYS = ":rows has dtype float32"


def attack(good: bytes) -> bytes:
    return with_entry(good, "rows", dtype="F32")
