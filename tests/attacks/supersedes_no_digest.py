"""A superseded pack that is no pack id."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_manifest

ERROR = PackContentError
SAYS = "an entry of supersedes or requires is not a SHA-256"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: manifest.update(supersedes=["latest"]))
