"""A field of a newer format in a result digest."""

from nestpatch.errors import PackTooNewError
from tests.attacks.tools import with_manifest

ERROR = PackTooNewError
SAYS = "has the unknown field 'sha512'"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: next(iter(manifest["result"]["tensors"].values())).update(sha512=""))
