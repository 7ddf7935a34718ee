"""A time with an offset."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_manifest

ERROR = PackContentError
SAYS = "created is not a UTC time"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: manifest.update(created="2026-11-23T12:00:00+01:00"))
