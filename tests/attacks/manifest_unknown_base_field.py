"""A field of a newer format in base."""

from nestpatch.errors import PackTooNewError
from tests.attacks.tools import with_manifest

ERROR = PackTooNewError
SAYS = "the manifest's base has the unknown field 'quantization'"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: manifest["base"].update(quantization="Q4_K"))
