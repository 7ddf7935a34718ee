"""The manifest is valid JSON, with escapes for plain characters."""

import json

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_manifest_text

ERROR = PackFormatError
SAYS = "the manifest is not canonical JSON"


def attack(good: bytes) -> bytes:
    return with_manifest_text(good, lambda text: json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")))
