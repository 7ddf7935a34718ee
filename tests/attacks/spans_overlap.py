"""Two tensors share their last bytes."""

from nestpatch.errors import PackFormatError
from tests.attacks.tools import Json, with_header

ERROR = PackFormatError
SAYS = "the tensors overlap at byte 32"


def attack(good: bytes) -> bytes:
    return with_header(good, overlap)


def overlap(header: Json) -> None:
    second = sorted(name for name in header if name.endswith(":rows"))[1]
    header[second]["data_offsets"] = [32, 68]
