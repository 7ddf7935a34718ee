"""A tensor is changed that the manifest's base lacks."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_manifest

ERROR = PackContentError
SAYS = "base.tensors and the arrays disagree about"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: manifest["base"]["tensors"].popitem())
