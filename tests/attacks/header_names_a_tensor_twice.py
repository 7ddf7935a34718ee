"""The same tensor is described twice; the last one would win."""

import json

from nestpatch.errors import PackFormatError
from tests.attacks.tools import first_tensor, with_header_text

ERROR = PackFormatError
SAYS = "the header has the duplicate key 'model.layers.0.mlp.gate_proj.weight:rows'"


def attack(good: bytes) -> bytes:
    return with_header_text(good, double)


def double(text: str) -> str:
    name = f"{first_tensor(json.loads(text))}:rows"
    entry = json.dumps({name: json.loads(text)[name]})[1:-1]
    return f"{text[:-1]},{entry}}}"
