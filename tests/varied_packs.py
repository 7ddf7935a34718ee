"""Packs whose tensors differ in rank and in rows, for any model directory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from nestpatch.pack import Pack
from tests.helpers import tiny_pack


def varied_pack(model: Path, tensors: Sequence[str], *, scale: float = 0.3, seed: int = 0, kind: str = "clusters") -> Pack:
    """A pack that changes these tensors through 1, 2, 3, ... vectors, with the model's own architecture.

    Of the kind "mixed", those of every second tensor are of low rank.
    """
    parts = [
        tiny_pack(model, tensors=[name], clusters=1 + number % 5, neurons=7 + number % 3, delta_dtype="F32", scale=scale,
                  seed=seed + number, kind="low rank" if kind == "mixed" and number % 2 == 0 else "clusters")
        for number, name in enumerate(sorted(tensors))
    ]  # fmt: skip
    identities = {name: identity for part in parts for name, identity in part.manifest.base.tensors.items()}
    results = {name: digest for part in parts for name, digest in part.manifest.result.items()}
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    base = dataclasses.replace(parts[0].manifest.base, tensors=identities, architecture=config["architectures"][0], dtype="F32")
    manifest = dataclasses.replace(parts[0].manifest, base=base, result=results)
    return Pack(manifest, tuple(delta for part in parts for delta in part))


def with_architecture(pack: Pack, architecture: str) -> Pack:
    """The same pack for a model of another class."""
    base = dataclasses.replace(pack.manifest.base, architecture=architecture)
    return Pack(dataclasses.replace(pack.manifest, base=base), pack.deltas)
