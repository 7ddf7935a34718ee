"""nestpatch: apt for the safety of language models.

>>> import nestpatch
>>> pack = nestpatch.load_pack("no-harm-1.0.0.nest")
>>> nestpatch.apply_in_place("path/to/model", pack)
>>> nestpatch.verify("path/to/model").verdict
>>> nestpatch.revert("path/to/model")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestpatch.formats.nest import read as load_pack
    from nestpatch.gate import prove
    from nestpatch.hub.follow import pull
    from nestpatch.hub.publish import push
    from nestpatch.nest_train.assess import assess as evaluate
    from nestpatch.nest_train.train import train
    from nestpatch.onnx_export.to_onnx import export_onnx
    from nestpatch.patcher.adapters import export_gguf_lora, export_lora, export_onnx_adapter
    from nestpatch.patcher.apply import apply
    from nestpatch.patcher.diff import diff
    from nestpatch.patcher.export import export_gguf, export_safetensors
    from nestpatch.patcher.inplace import apply_in_place, revert
    from nestpatch.patcher.update import update
    from nestpatch.patcher.verify import verify
    from nestpatch.signing.trust import load_policy
    from nestpatch.signing.verify import sign_pack as sign
    from nestpatch.signing.verify import verify_signature

__version__ = "0.1.0"

_HOMES = {
    "apply": ("nestpatch.patcher.apply", "apply"),
    "apply_in_place": ("nestpatch.patcher.inplace", "apply_in_place"),
    "diff": ("nestpatch.patcher.diff", "diff"),
    "evaluate": ("nestpatch.nest_train.assess", "assess"),
    "export_gguf": ("nestpatch.patcher.export", "export_gguf"),
    "export_gguf_lora": ("nestpatch.patcher.adapters", "export_gguf_lora"),
    "export_lora": ("nestpatch.patcher.adapters", "export_lora"),
    "export_onnx": ("nestpatch.onnx_export.to_onnx", "export_onnx"),
    "export_onnx_adapter": ("nestpatch.patcher.adapters", "export_onnx_adapter"),
    "export_safetensors": ("nestpatch.patcher.export", "export_safetensors"),
    "load_pack": ("nestpatch.formats.nest", "read"),
    "load_policy": ("nestpatch.signing.trust", "load_policy"),
    "prove": ("nestpatch.gate", "prove"),
    "pull": ("nestpatch.hub.follow", "pull"),
    "push": ("nestpatch.hub.publish", "push"),
    "revert": ("nestpatch.patcher.inplace", "revert"),
    "sign": ("nestpatch.signing.verify", "sign_pack"),
    "train": ("nestpatch.nest_train.train", "train"),
    "update": ("nestpatch.patcher.update", "update"),
    "verify": ("nestpatch.patcher.verify", "verify"),
    "verify_signature": ("nestpatch.signing.verify", "verify_signature"),
}
__all__ = [
    "__version__",
    "apply",
    "apply_in_place",
    "diff",
    "evaluate",
    "export_gguf",
    "export_gguf_lora",
    "export_lora",
    "export_onnx",
    "export_onnx_adapter",
    "export_safetensors",
    "load_pack",
    "load_policy",
    "prove",
    "pull",
    "push",
    "revert",
    "sign",
    "train",
    "update",
    "verify",
    "verify_signature",
]


def __getattr__(name: str) -> Any:
    # On first use: patching must not pay for torch, and `nestpatch --help` for nothing.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)
