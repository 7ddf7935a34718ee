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
    from nestpatch.channels.follow import pull
    from nestpatch.channels.publish import push
    from nestpatch.compare.diff import diff
    from nestpatch.evaluation.evaluator import evaluate as evaluate
    from nestpatch.export.adapters import export_gguf_lora, export_lora, export_onnx_adapter
    from nestpatch.export.gguf import export_gguf
    from nestpatch.export.onnx.exporter import export_onnx
    from nestpatch.export.safetensors import export_safetensors
    from nestpatch.formats.nest import read as load_pack
    from nestpatch.gate import prove
    from nestpatch.nest_train.train import train
    from nestpatch.patcher.apply import apply
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
    "diff": ("nestpatch.compare.diff", "diff"),
    "evaluate": ("nestpatch.evaluation.evaluator", "assess"),
    "export_gguf": ("nestpatch.export.gguf", "export_gguf"),
    "export_gguf_lora": ("nestpatch.export.adapters", "export_gguf_lora"),
    "export_lora": ("nestpatch.export.adapters", "export_lora"),
    "export_onnx": ("nestpatch.export.onnx.exporter", "export_onnx"),
    "export_onnx_adapter": ("nestpatch.export.adapters", "export_onnx_adapter"),
    "export_safetensors": ("nestpatch.export.safetensors", "export_safetensors"),
    "load_pack": ("nestpatch.formats.nest", "read"),
    "load_policy": ("nestpatch.signing.trust", "load_policy"),
    "prove": ("nestpatch.gate", "prove"),
    "pull": ("nestpatch.channels.follow", "pull"),
    "push": ("nestpatch.channels.publish", "push"),
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
