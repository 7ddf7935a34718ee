"""A base stored in a dtype that cannot be patched."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_base

ERROR = PackContentError
SAYS = "a base tensor has dtype 'I8'"


def attack(good: bytes) -> bytes:
    return with_base(good, dtype="I8")
