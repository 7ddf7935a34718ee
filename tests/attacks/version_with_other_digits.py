"""A version in Arabic-Indic digits."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_manifest

ERROR = PackContentError
SAYS = "is not semver"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: manifest.update(version="\u0661.0.0"))
