"""A detector in the format of packs without one, which older readers would not expect."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_detector, with_manifest

ERROR = PackContentError
SAYS = "the format nest/1 of the pack does not have what it holds: a detector"


def attack(good: bytes) -> bytes:
    return with_manifest(with_detector(good), lambda manifest: manifest.update(format="nest/1"))
