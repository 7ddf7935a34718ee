"""The description holds half a character, written as an escape."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_manifest_text

ERROR = PackContentError
SAYS = "the manifest cannot be written as JSON"


def attack(good: bytes) -> bytes:
    return with_manifest_text(good, lambda text: text.replace('"description":"', '"description":"\\ud800'))
