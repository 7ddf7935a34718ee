"""A result digest that no rows can have."""

from nestpatch.errors import PackContentError
from tests.attacks.tools import with_manifest

ERROR = PackContentError
SAYS = "the result digest of model.layers.0.mlp.gate_proj.weight is not a SHA-256"


def attack(good: bytes) -> bytes:
    return with_manifest(good, lambda manifest: next(iter(manifest["result"]["tensors"].values())).update(rows_sha256="x" * 64))
