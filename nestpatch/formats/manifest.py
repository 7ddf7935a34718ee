"""The manifest of a `.nest` file as canonical JSON. docs/nest-format.md is the normative text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeGuard

from nestpatch.detector import DetectorFacts
from nestpatch.errors import PackContentError, PackFormatError, PackTooNewError
from nestpatch.pack import FORMATS, BaseIdentity, Manifest, Pack, TensorIdentity

_MANIFEST_FIELDS: dict[str, type] = {
    "format": str,
    "name": str,
    "version": str,
    "description": str,
    "license": str,
    "created": str,
    "tags": list,
    "base": dict,
    "result": dict,
    "supersedes": list,
    "requires": list,
    "method": dict,
    "evaluation": dict,
}
_DETECTOR_FIELDS: dict[str, type] = {
    "layer": int,
    "pooling": str,
    "bias": float,
    "threshold": float,
    "max_false_positive_rate": float,
    "auc": float,
    "detection_rate": float,
    "false_positive_rate": float,
    "harmful": int,
    "harmless": int,
}
_BASE_FIELDS: dict[str, type] = {
    "model_id": str,
    "revision": str,
    "architecture": str,
    "dtype": str,
    "tensors": dict,
}
_IDENTITY_FIELDS: dict[str, type] = {"shape": list, "dtype": str, "sha256": str, "rows_sha256": str}
_RESULT_FIELDS: dict[str, type] = {"rows_sha256": str}


def canonical_json(value: Any) -> str:
    """Encodes a value as JSON in the one form that packs use: sorted keys, no spaces, no needless escapes.

    Args:
        value: Plain JSON values.

    Returns:
        The text.

    Raises:
        PackContentError: JSON cannot hold the value (NaN, infinity, lone surrogates, other types), or it is nested too deeply.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise PackContentError(f"the manifest cannot be written as JSON: {error}") from error
    return text


def whole_numbers(value: Any) -> TypeGuard[list[int]]:
    """Whether a JSON value is a list of integers from 0 to 2^63 - 1.

    Args:
        value: Any JSON value.
    """
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def strict_json(text: bytes | str, what: str) -> Any:
    """Parses JSON without duplicate keys, NaN and infinity.

    Args:
        text: The text, bytes in UTF-8.
        what: What it is, for the error.

    Returns:
        The JSON value.

    Raises:
        PackFormatError: It is something else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise PackFormatError(f"the {what} has the duplicate key {twice!r}")
        return result

    def refuse(constant: str) -> Any:
        raise PackFormatError(f"the {what} holds {constant}")

    try:
        # Bytes would let json guess UTF-16.
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(decoded, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise PackFormatError(f"the {what} is not valid JSON: {error}") from None


def manifest_json(pack: Pack) -> dict[str, Any]:
    """Converts the manifest of a pack to plain JSON values, in the layout of docs/nest-format.md.

    Args:
        pack: The pack, whose content decides the format.

    Returns:
        A JSON object.
    """
    manifest, base = pack.manifest, pack.manifest.base
    tensors = {
        name: {"shape": list(t.shape), "dtype": t.dtype, "sha256": t.sha256, "rows_sha256": t.rows_sha256}
        for name, t in base.tensors.items()
    }
    detector = {} if manifest.detector is None else {"detector": manifest.detector.as_json()}
    return {
        "format": pack.format,
        "name": manifest.name,
        "version": manifest.version,
        "description": manifest.description,
        "license": manifest.license,
        "created": manifest.created,
        "tags": list(manifest.tags),
        "base": {
            "model_id": base.model_id,
            "revision": base.revision,
            "architecture": base.architecture,
            "dtype": base.dtype,
            "tensors": tensors,
        },
        "result": {"tensors": {name: {"rows_sha256": value} for name, value in manifest.result.items()}},
        "supersedes": list(manifest.supersedes),
        "requires": list(manifest.requires),
        "method": dict(manifest.method),
        "evaluation": dict(manifest.evaluation),
        **detector,
    }


def parse_manifest(text: str) -> tuple[str, Manifest]:
    """Parses a manifest.

    Args:
        text: Canonical JSON.

    Returns:
        The format that it names, one of FORMATS, and the manifest.

    Raises:
        PackFormatError: It is not canonical JSON, or a field is missing or of the wrong type.
        PackTooNewError: It has a format version or a field that this nestpatch does not know.
        PackContentError: A value is impossible.
    """
    value = strict_json(text, "manifest")
    if isinstance(value, dict) and isinstance(value.get("format"), str) and value["format"] not in FORMATS:
        known = " and ".join(map(repr, FORMATS))
        raise PackTooNewError(f"the pack has format {value['format'][:40]!r}; this nestpatch reads {known}")
    optional = {"detector": dict} if isinstance(value, dict) and "detector" in value else {}
    _require_fields(value, {**_MANIFEST_FIELDS, **optional}, "manifest")
    if canonical_json(value) != text:
        raise PackFormatError("the manifest is not canonical JSON (sorted keys, no spaces)")
    base, result = value["base"], value["result"]
    _require_fields(base, _BASE_FIELDS, "manifest's base")
    _require_fields(result, {"tensors": dict}, "manifest's result")
    for kind in ("tags", "supersedes", "requires"):
        if not all(isinstance(entry, str) for entry in value[kind]):
            raise PackFormatError(f"the manifest's {kind} must be a list of strings")
    for name, entry in result["tensors"].items():
        _require_fields(entry, _RESULT_FIELDS, f"result tensor {name!r}")
    for name, entry in base["tensors"].items():
        _require_fields(entry, _IDENTITY_FIELDS, f"base tensor {name!r}")
        if not whole_numbers(entry["shape"]):
            raise PackFormatError(f"base tensor {name!r} has an impossible shape")
    if optional:
        _require_fields(value["detector"], _DETECTOR_FIELDS, "manifest's detector")
    identities = {
        name: TensorIdentity(tuple(entry["shape"]), entry["dtype"], entry["sha256"], entry["rows_sha256"])
        for name, entry in base["tensors"].items()
    }
    plain = {k: value[k] for k in ("name", "version", "description", "license", "created", "method", "evaluation")}
    manifest = Manifest(
        **plain,
        tags=tuple(value["tags"]),
        supersedes=tuple(value["supersedes"]),
        requires=tuple(value["requires"]),
        base=BaseIdentity(base["model_id"], base["revision"], base["architecture"], base["dtype"], identities),
        result={name: entry["rows_sha256"] for name, entry in result["tensors"].items()},
        detector=DetectorFacts(**value["detector"]) if optional else None,
    )
    return value["format"], manifest


def _require_fields(value: Any, fields: Mapping[str, type], what: str) -> None:
    if not isinstance(value, dict):
        raise PackFormatError(f"the {what} is not a JSON object")
    if unknown := sorted(set(value) - set(fields)):
        raise PackTooNewError(f"the {what} has the unknown field {unknown[0]!r}")
    for name, kind in fields.items():
        if name not in value:
            raise PackFormatError(f"the {what} lacks the field {name!r}")
        if type(value[name]) is not kind:
            raise PackFormatError(f"the {what} has a {name!r} that is not of type {kind.__name__}")
