"""Three projections instead of four."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_array

ERROR = PackContentError
SAYS = ":sketch has shape [9, 3]"


def attack(good: bytes) -> bytes:
    return with_array(good, "sketch", lambda sketch: sketch[:, :3])
