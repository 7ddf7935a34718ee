"""A base of a type whose quantizer needs an importance matrix: nothing could merge the pack into it."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_quantized_base

ERROR = PackContentError
SAYS = "a base tensor has dtype 'IQ2_XXS'"


def attack(good: bytes) -> bytes:
    # The other tensors make it a nest/2 pack.
    return with_quantized_base(good, "IQ2_XXS", others="Q8_0", width=32)
