"""Two identities for one tensor of the base."""

import json

from nestpatch.errors import PackFormatError
from tests.attacks.tools import first_tensor, with_manifest_text

ERROR = PackFormatError
SAYS = "has the duplicate key"


def attack(good: bytes) -> bytes:
    return with_manifest_text(good, double)


def double(text: str) -> str:
    name = first_tensor({f"{n}:": 0 for n in json.loads(text)["base"]["tensors"]})
    return text.replace('"tensors":{', f'"tensors":{{"{name}":{{}},', 1)
