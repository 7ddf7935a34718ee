"""A tensor without its sketch."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import first_tensor, with_arrays

ERROR = PackFormatError
SAYS = "gate_proj.weight:sketch' is missing"


def attack(good: bytes) -> bytes:
    return with_arrays(good, lambda arrays: arrays.pop(f"{first_tensor(arrays)}:sketch"))
