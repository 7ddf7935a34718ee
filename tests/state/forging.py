"""What a hostile model repository can write beside its weights: everything that needs no key of this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.pack import Pack
from nestpatch.patcher._undo import MAGIC, TensorPacker, undo_block
from nestpatch.patcher.ledger import FORMAT
from nestpatch.patcher.state_dir import StateDir
from nestpatch.rows import Rows
from nestpatch.signing.verify import signature_files
from tests.state.conftest import Scene

TRANSACTION = "f0" * 8
WHEN = "2026-11-25T08:00:00Z"
Lie = Callable[[str, Rows], Rows]
"""(tensor, its present rows) -> the rows that an undo record claims for before."""


def content(state_dir: StateDir) -> dict[str, Any]:
    """The content of a ledger, without its checksum and seal."""
    value: dict[str, Any] = json.loads(state_dir.ledger.read_text(encoding="utf-8"))
    return {name: part for name, part in value.items() if name not in {"sha256", "seal"}}


def write_ledger(state_dir: StateDir, value: dict[str, Any], seal: str = "00" * 32) -> None:
    """Writes a ledger with a correct checksum, which needs no key, and an invalid seal."""
    digest = sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    state_dir.ledger.write_text(json.dumps({**value, "sha256": digest, "seal": seal}), encoding="utf-8")


def edit(state_dir: StateDir, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the ledger and corrects its checksum."""
    value = content(state_dir)
    change(value)
    write_ledger(state_dir, value)


def ledger(*entries: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A ledger's content."""
    return {"format": FORMAT, "transaction": TRANSACTION, "applied": list(entries), "history": [], **more}


def entry(pack: Pack, tensors: dict[str, Any], strength: float = 1.0, **claims: Any) -> dict[str, Any]:
    """An entry as nestpatch would write it, with some claims replaced."""
    manifest = pack.manifest
    return {
        "pack_id": nest.pack_id(pack),
        "name": manifest.name,
        "version": manifest.version,
        "strength": strength,
        "when": WHEN,
        "tool": "nestpatch 0.1.0",
        "transaction": TRANSACTION,
        "tensors": tensors,
        "supersedes": list(manifest.supersedes),
        "requires": list(manifest.requires),
        "base_mismatch_allowed": False,
        "rounding": "",
        "signers": {},
        "roots": [],
        "foreign": False,
        **claims,
    }


def event(pack: Pack, what: str = "applied", **claims: str) -> dict[str, str]:
    """An event of a history."""
    manifest = pack.manifest
    line = {"what": what, "when": WHEN, "pack_id": nest.pack_id(pack), "name": manifest.name, "version": manifest.version}
    return {**line, **claims}


def honest(name: str, rows: Rows) -> Rows:
    """Claims that the rows were always like this."""
    return rows


def plant(scene: Scene, file: Path, strength: float = 1.0, lie: Lie = honest, *, undo: bool = True, **claims: Any) -> Pack:
    """Claims that a pack is applied: writes a ledger, the kept pack with the signatures of its file, and an undo record that
    turns the present rows into what `lie` returns.
    """
    pack, state_dir = nest.read(file), scene.state_dir
    keep(state_dir, file)
    found = write_undo(scene, pack, state_dir.undo(f"{TRANSACTION}-{nest.pack_id(pack)[:16]}"), strength, lie)
    if not undo:
        state_dir.undo(f"{TRANSACTION}-{nest.pack_id(pack)[:16]}").unlink()
    write_ledger(state_dir, ledger(entry(pack, found, strength, **claims), history=[event(pack)]))
    return pack


def keep(state_dir: StateDir, file: Path) -> Path:
    """Copies a pack's file and its signatures to where kept packs are."""
    state_dir.folder.mkdir(exist_ok=True)
    kept = state_dir.pack(sha256(file.read_bytes()).hexdigest())
    shutil.copyfile(file, kept)
    for signature in signature_files(file):
        shutil.copyfile(signature, kept.with_name(kept.name + signature.name.removeprefix(file.name)))
    return kept


def write_undo(scene: Scene, pack: Pack, path: Path, strength: float = 1.0, lie: Lie = honest) -> dict[str, Any]:
    """Writes an undo record that turns the present rows into what `lie` returns; returns the tensors of the matching entry."""
    checkpoint, tensors = open_checkpoint(scene.model), {}
    with open(path, "wb") as file:
        file.write(MAGIC)
        for delta in pack:
            current = checkpoint.read_rows(delta.name, delta.rows.astype(np.int64))
            original = np.ascontiguousarray(lie(delta.name, current))
            packer = TensorPacker()
            packer.add(undo_block(original, current, delta.dense(), strength))
            packer.write(file)
            before, after = (sha256(rows.tobytes()).hexdigest() for rows in (original, current))
            tensors[delta.name] = {"rows": delta.neurons, "before": before, "after": after, "retention": None}
    return tensors


def based(scene: Scene) -> list[object]:
    """The option by which quantized rows are compared and restored exactly."""
    return ["--base", scene.base] if scene.kind == "gguf" else []


def nothing(scene: Scene, name: str = "no-harm", version: str = "99.0.0") -> Pack:
    """A well-formed pack that changes nothing: its base is its result."""
    pack = scene.pack(name, version)
    deltas = tuple(replace(delta, delta=np.zeros_like(delta.delta)) for delta in pack)
    result = {delta.name: pack.manifest.base.tensors[delta.name].rows_sha256 for delta in pack}
    return Pack(replace(pack.manifest, result=result), deltas)


def harmless(scene: Scene, key: str | None = None) -> Path:
    """The honest pack that the forged ledgers name."""
    return scene.write(scene.pack(), scene.acme if key is None else None)


def apart(scene: Scene, pack: Pack) -> Pack:
    """A pack that changes other rows of the same tensors."""
    for seed in range(100, 4000):
        other = scene.pack("other", seed=seed, neurons=3)
        if not any(np.intersect1d(a.rows, b.rows).size for a, b in zip(pack, other, strict=True)):
            return other
    raise AssertionError("no such pack")
