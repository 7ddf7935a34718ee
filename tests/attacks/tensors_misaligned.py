"""The tensors are in the order of their names, so that wide types begin at odd bytes."""

import json

import numpy as np

from nestpatch.errors import PackFormatError
from tests.attacks.tools import CODES, lay_out, split

ERROR = PackFormatError
SAYS = "not in canonical form"


def attack(good: bytes) -> bytes:
    text, body = split(good)
    header = json.loads(text)
    metadata = header.pop("__metadata__")
    arrays = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        arrays[name] = np.frombuffer(body[start:stop], CODES[entry["dtype"]]).reshape(entry["shape"])
    return lay_out(metadata, arrays, sorted(arrays))
