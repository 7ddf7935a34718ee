"""The format of quantized bases for a pack that has none: it would have two files, and two ids."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_manifest

ERROR = PackContentError
SAYS = "no base tensor of a nest/2 pack is quantized, and it has no detector: its format must be nest/1"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: manifest.update(format="nest/2"))
