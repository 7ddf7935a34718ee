"""A detector in the format of packs without one, which older readers would not expect."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_detector, with_manifest

ERROR = PackContentError
SAYS = "a nest/1 pack has a detector: its format must be nest/2"


def attack(good: bytes) -> bytes:
    return with_manifest(with_detector(good), lambda manifest: manifest.update(format="nest/1"))
