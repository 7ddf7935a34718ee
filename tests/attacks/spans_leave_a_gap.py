"""Four bytes between two tensors belong to no tensor."""

import json

from nestpatch.errors import PackFormatError
from tests.attacks.tools import compact, join, split

ERROR = PackFormatError
SAYS = "the tensors leave a gap at byte 36"


def attack(good: bytes) -> bytes:
    text, body = split(good)
    header = json.loads(text)
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= 36:
            entry["data_offsets"] = [n + 4 for n in entry["data_offsets"]]
    return join(compact(header), body[:36] + b"hide" + body[36:])
