"""A tensor without a name."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import rename_tensor

ERROR = PackContentError
SAYS = "'' is not a tensor name"


def attack(good: bytes) -> bytes:
    return rename_tensor(good, "")
