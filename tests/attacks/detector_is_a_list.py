"""A detector that is no object."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_detector, with_manifest

ERROR = PackFormatError
SAYS = "the manifest has a 'detector' that is not of type dict"


def attack(good: bytes) -> bytes:
    return with_manifest(with_detector(good), lambda manifest: manifest.update(detector=[]))
