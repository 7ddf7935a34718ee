"""Bytes before the first tensor belong to no tensor."""

import json

from nestpatch.errors import PackFormatError
from tests.attacks.tools import compact, join, split

ERROR = PackFormatError
SAYS = "the tensors leave a gap at byte 0"


def attack(good: bytes) -> bytes:
    text, body = split(good)
    header = json.loads(text)
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [n + 64 for n in entry["data_offsets"]]
    return join(compact(header), b"h" * 64 + body)
