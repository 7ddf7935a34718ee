"""A field of a newer format in an identity."""

from nestpatch.errors import PackTooNewError
from tests.attacks.tools import with_manifest

ERROR = PackTooNewError
SAYS = "has the unknown field 'layout'"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: next(iter(manifest["base"]["tensors"].values())).update(layout="packed"))
