"""The format of newer packs for one that nest/1 can hold: it would have two files, and two ids."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_manifest

ERROR = PackContentError
SAYS = "the pack holds nothing that needs nest/2: its format must be nest/1"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: manifest.update(format="nest/2"))
