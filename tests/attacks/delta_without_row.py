"""A delta that no row uses, room for hidden bytes."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_array

ERROR = PackContentError
SAYS = "1 of 2 deltas have no row"


def attack(good: bytes) -> bytes:
    return with_array(good, "cluster", lambda cluster: cluster * 0)
