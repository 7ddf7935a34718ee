"""A row without a cluster."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_array

ERROR = PackContentError
SAYS = "rows and cluster differ in length"


def attack(good: bytes) -> bytes:
    return with_array(good, "cluster", lambda cluster: cluster[:-1])
