"""A quantized base whose rows end inside a block."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_quantized_base

ERROR = PackContentError
SAYS = "a base tensor has rows of 16 elements, Q4_1 blocks of 32"


def attack(good: bytes) -> bytes:
    return with_quantized_base(good, "Q4_1")
