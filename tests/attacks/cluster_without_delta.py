"""A row of a cluster that has no delta."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_array

ERROR = PackContentError
SAYS = "cluster 2 has no delta; there are 2"


def attack(good: bytes) -> bytes:
    return with_array(good, "cluster", lambda cluster: [2, *cluster[1:]])
