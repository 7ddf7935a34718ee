"""The 30th of February."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_manifest

ERROR = PackContentError
SAYS = "created is not a UTC time"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: manifest.update(created="2026-02-30T12:00:00Z"))
