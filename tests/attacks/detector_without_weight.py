"""A detector that the manifest describes, and whose weight is missing."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_arrays, with_detector

ERROR = PackContentError
SAYS = "the manifest describes a detector, and there is no tensor detector:weight"


def attack(good: bytes) -> bytes:
    return with_arrays(with_detector(good), lambda arrays: arrays.pop("detector:weight"))
