"""The manifest is valid JSON, its keys in another order."""

import json

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_manifest_text

ERROR = PackFormatError
SAYS = "the manifest is not canonical JSON"


def attack(good: bytes) -> bytes:
    return with_manifest_text(good, turn_round)


def turn_round(text: str) -> str:
    return json.dumps(dict(reversed(json.loads(text).items())), separators=(",", ":"), ensure_ascii=False)
