"""Safety patches for language models: trained once, shipped as a signed megabyte, merged in place, undone bit for bit.

>>> import nestpatch
>>> nestpatch.apply_in_place("path/to/model", "no-harm-1.0.0.nest")
>>> nestpatch.verify("path/to/model", "no-harm-1.0.0.nest").verdict
>>> nestpatch.revert("path/to/model")

Everything public is listed in `__all__`: verbs, and the values that they take and return. Exceptions other than
`NestpatchError`, the root of their tree, are in `nestpatch.errors`. Names are imported on first use, so that patching does not
load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestpatch.channels.follow import pull as pull
    from nestpatch.channels.publish import push as push
    from nestpatch.channels.publish import renew as renew
    from nestpatch.channels.publish import yank as yank
    from nestpatch.compare.diff import diff as diff
    from nestpatch.compare.extract import extract as extract
    from nestpatch.errors import NestpatchError as NestpatchError
    from nestpatch.evaluation.detecting import Detected as Detected
    from nestpatch.evaluation.detecting import detect as detect
    from nestpatch.evaluation.dose import Dose as Dose
    from nestpatch.evaluation.evaluator import evaluate as evaluate
    from nestpatch.evaluation.result import Evaluation as Evaluation
    from nestpatch.evaluation.scores import Scores as Scores
    from nestpatch.evaluation.suites import Suite as Suite
    from nestpatch.evaluation.suites import builtin_suites as builtin_suites
    from nestpatch.evaluation.suites import load_suite as load_suite
    from nestpatch.evaluation.suites import load_suites as load_suites
    from nestpatch.events import Event as Event
    from nestpatch.export.adapters import export_gguf_lora as export_gguf_lora
    from nestpatch.export.adapters import export_lora as export_lora
    from nestpatch.export.adapters import export_onnx_adapter as export_onnx_adapter
    from nestpatch.export.gguf import export_gguf as export_gguf
    from nestpatch.export.onnx.exporter import export_onnx as export_onnx
    from nestpatch.export.safetensors import export_safetensors as export_safetensors
    from nestpatch.formats.nest import read as load_pack
    from nestpatch.formats.nest import write as save_pack
    from nestpatch.gate import Proven as Proven
    from nestpatch.gate import prove as prove
    from nestpatch.guarding.callback import GuardCallback as GuardCallback
    from nestpatch.guarding.export import ExportedGuard as ExportedGuard
    from nestpatch.guarding.export import export_guard as export_guard
    from nestpatch.guarding.file import read as load_guard
    from nestpatch.guarding.guard import Guard as Guard
    from nestpatch.guarding.holding import GuardedModel as GuardedModel
    from nestpatch.guarding.holding import guard_model as guard_model
    from nestpatch.health.diagnosis import Diagnosis as Diagnosis
    from nestpatch.health.diagnosis import doctor as doctor
    from nestpatch.nest_train.data import TrainingData as TrainingData
    from nestpatch.nest_train.plan import TrainingPlan as TrainingPlan
    from nestpatch.nest_train.plan import plan as plan_training
    from nestpatch.nest_train.recipe import Recipe as Recipe
    from nestpatch.nest_train.result import Trained as Trained
    from nestpatch.nest_train.train import train as train
    from nestpatch.pack import Label as Label
    from nestpatch.pack import Pack as Pack
    from nestpatch.patcher.apply import Applied as Applied
    from nestpatch.patcher.apply import apply as apply
    from nestpatch.patcher.fleet import UpdatedModel as UpdatedModel
    from nestpatch.patcher.fleet import update_all as update_all
    from nestpatch.patcher.inplace import Changed as Changed
    from nestpatch.patcher.inplace import apply_in_place as apply_in_place
    from nestpatch.patcher.inplace import revert as revert
    from nestpatch.patcher.recovery import recover_model as recover
    from nestpatch.patcher.registry import PatchedModel as PatchedModel
    from nestpatch.patcher.registry import patched_models as patched_models
    from nestpatch.patcher.status import Status as Status
    from nestpatch.patcher.status import status as status
    from nestpatch.patcher.update import Updated as Updated
    from nestpatch.patcher.update import update as update
    from nestpatch.patcher.verify import Verdict as Verdict
    from nestpatch.patcher.verify import Verification as Verification
    from nestpatch.patcher.verify import verify as verify
    from nestpatch.prompts.readers import PromptSet as PromptSet
    from nestpatch.prompts.readers import load_prompts as load_prompts
    from nestpatch.restore.carry import carry as carry
    from nestpatch.restore.extrapolate import extrapolate as extrapolate
    from nestpatch.restore.result import Restored as Restored
    from nestpatch.restore.transplant import transplant as transplant
    from nestpatch.signing.keys import PrivateKey as PrivateKey
    from nestpatch.signing.keys import keygen as keygen
    from nestpatch.signing.keys import read_private as load_key
    from nestpatch.signing.store import load_policy as load_policy
    from nestpatch.signing.store import trust_key as trust_key
    from nestpatch.signing.trust import Policy as Policy
    from nestpatch.signing.trust import TrustedKey as TrustedKey
    from nestpatch.signing.verify import sign_pack as sign
    from nestpatch.signing.verify import verify_signature as verify_signature

__version__ = "0.1.0"

# Name -> its module, and its name there where that differs. tests/test_public_api.py compares it with the imports above.
_HOMES = {
    "apply": "patcher.apply",
    "apply_in_place": "patcher.inplace",
    "builtin_suites": "evaluation.suites",
    "carry": "restore.carry",
    "detect": "evaluation.detecting",
    "diff": "compare.diff",
    "doctor": "health.diagnosis",
    "evaluate": "evaluation.evaluator",
    "export_gguf": "export.gguf",
    "export_gguf_lora": "export.adapters",
    "export_guard": "guarding.export",
    "export_lora": "export.adapters",
    "export_onnx": "export.onnx.exporter",
    "export_onnx_adapter": "export.adapters",
    "export_safetensors": "export.safetensors",
    "extract": "compare.extract",
    "extrapolate": "restore.extrapolate",
    "guard_model": "guarding.holding",
    "keygen": "signing.keys",
    "load_guard": "guarding.file:read",
    "load_key": "signing.keys:read_private",
    "load_pack": "formats.nest:read",
    "load_policy": "signing.store",
    "load_prompts": "prompts.readers",
    "load_suite": "evaluation.suites",
    "load_suites": "evaluation.suites",
    "patched_models": "patcher.registry",
    "plan_training": "nest_train.plan:plan",
    "prove": "gate",
    "pull": "channels.follow",
    "push": "channels.publish",
    "recover": "patcher.recovery:recover_model",
    "renew": "channels.publish",
    "revert": "patcher.inplace",
    "save_pack": "formats.nest:write",
    "sign": "signing.verify:sign_pack",
    "status": "patcher.status",
    "train": "nest_train.train",
    "transplant": "restore.transplant",
    "trust_key": "signing.store",
    "update": "patcher.update",
    "update_all": "patcher.fleet",
    "verify": "patcher.verify",
    "verify_signature": "signing.verify",
    "yank": "channels.publish",
    "Evaluation": "evaluation.result",
    "Applied": "patcher.apply",
    "Changed": "patcher.inplace",
    "Diagnosis": "health.diagnosis",
    "Detected": "evaluation.detecting",
    "Dose": "evaluation.dose",
    "Event": "events",
    "ExportedGuard": "guarding.export",
    "Guard": "guarding.guard",
    "GuardCallback": "guarding.callback",
    "GuardedModel": "guarding.holding",
    "Label": "pack",
    "NestpatchError": "errors",
    "Pack": "pack",
    "Policy": "signing.trust",
    "PatchedModel": "patcher.registry",
    "PrivateKey": "signing.keys",
    "PromptSet": "prompts.readers",
    "Proven": "gate",
    "Recipe": "nest_train.recipe",
    "Restored": "restore.result",
    "Scores": "evaluation.scores",
    "Status": "patcher.status",
    "Suite": "evaluation.suites",
    "Trained": "nest_train.result",
    "TrainingData": "nest_train.data",
    "TrainingPlan": "nest_train.plan",
    "TrustedKey": "signing.trust",
    "Updated": "patcher.update",
    "UpdatedModel": "patcher.fleet",
    "Verdict": "patcher.verify",
    "Verification": "patcher.verify",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - every entry is a name


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute or name)


def __dir__() -> list[str]:
    return sorted(__all__)
