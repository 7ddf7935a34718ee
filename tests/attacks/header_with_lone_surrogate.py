"""A tensor's name is half a character, written as an escape."""

import json

from nestpatch.errors import PackContentError
from tests.attacks.tools import first_tensor, with_header_text

ERROR = PackContentError
SAYS = "is not a tensor name"


def attack(good: bytes) -> bytes:
    return with_header_text(good, lambda text: text.replace(f'"{first_tensor(json.loads(text))}:', '"\\ud800:'))
