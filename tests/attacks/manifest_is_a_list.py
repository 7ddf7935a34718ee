"""The manifest is JSON, but no object."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_manifest_text

ERROR = PackFormatError
SAYS = "the manifest is not a JSON object"


def attack(good: bytes) -> bytes:
    return with_manifest_text(good, lambda text: f"[{text}]")
