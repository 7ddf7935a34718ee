"""A field of a newer format in result."""

from nestpatch.errors import PackTooNewError
from tests.attacks.tools import with_manifest

ERROR = PackTooNewError
SAYS = "the manifest's result has the unknown field 'note'"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: manifest["result"].update(note=""))
