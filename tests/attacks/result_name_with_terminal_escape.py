"""A name that would clear the screen of whoever reads the error."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_manifest

ERROR = PackContentError
SAYS = "result.tensors and the arrays disagree about"


def attack(good: bytes) -> bytes:
    digest = {"rows_sha256": "0" * 64}
    return with_manifest(good, lambda manifest: manifest["result"]["tensors"].update({"\x1b[2J": digest}))
