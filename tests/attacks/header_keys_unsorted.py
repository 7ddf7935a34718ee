"""The header lists the same tensors in another order."""

import json

from nestpatch.errors import PackFormatError
from tests.attacks.tools import with_header_text

ERROR = PackFormatError
SAYS = "not in canonical form"


def attack(good: bytes) -> bytes:
    return with_header_text(good, turn_round)


def turn_round(text: str) -> str:
    return json.dumps(dict(reversed(json.loads(text).items())), separators=(",", ":"), ensure_ascii=False)
