"""A quantized base tensor in the format of float bases, where older readers would take its digests for those of floats."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_base

ERROR = PackContentError
SAYS = "a base tensor of a nest/1 pack is quantized: 'model.layers.0.mlp.gate_proj.weight' has dtype Q8_0"


def attack(good: bytes) -> bytes:
    return with_base(good, dtype="Q8_0")
