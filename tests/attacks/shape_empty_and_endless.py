"""No bytes, but 2**62 columns: an array library cannot make it."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import Json, with_header

ERROR = PackFormatError
SAYS = "shape"


def attack(good: bytes) -> bytes:
    return with_header(good, empty)


def empty(header: Json) -> None:
    header["a:delta"] = {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}
