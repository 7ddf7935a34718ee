"""A quantized type by another spelling of its name."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_quantized_base

ERROR = PackContentError
SAYS = "a base tensor has dtype 'q8_0'"


def attack(good: bytes) -> bytes:
    # The other tensors make it a nest/2 pack.
    return with_quantized_base(good, "q8_0", others="Q8_0", width=32)
