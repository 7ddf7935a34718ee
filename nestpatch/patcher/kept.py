"""Packs that are kept beside a model, with their signatures: undoing needs their deltas, and they prove what is applied.

They travel with the model. A kept copy is the pack that its name says only when its bytes have that SHA-256, and a publisher's
only when the signatures beside it are judged as those of a file are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from nestpatch.errors import LedgerError, PackError, SignatureError, SignatureFormatError, StateError, UndoError
from nestpatch.files.atomic import write_bytes
from nestpatch.files.reading import read_bounded
from nestpatch.formats import nest
from nestpatch.pack import Pack
from nestpatch.patcher.ledger import LedgerEntry
from nestpatch.patcher.state_dir import StateDir
from nestpatch.signing.envelopes import MAX_BYTES
from nestpatch.signing.subject import Origin, subject_of
from nestpatch.signing.trust import Policy
from nestpatch.signing.verify import SignatureResult, VerifiedPack, check_signatures, signature_files

_AGAIN = "Apply the pack's file again: nestpatch apply MODEL PATCH --in-place puts the copy back."
_SUFFIX = re.compile(r"(?:\.[0-9a-f]{12})?\.sig", re.ASCII)


def keep(state_dir: StateDir, pack: Pack, pack_id: str, origin: Origin) -> None:
    """Keeps a pack and its signatures; what lies there already under the same name is replaced unless it is the same."""
    _write(state_dir, state_dir.pack(pack_id), nest.encode(pack))
    for suffix, content in origin.signatures.items():
        if _SUFFIX.fullmatch(suffix):
            kept = state_dir.pack(pack_id)
            _write(state_dir, kept.with_name(f"{kept.name}{suffix}"), content)


def _write(state_dir: StateDir, file: Path, data: bytes) -> None:
    if _read(file) != data:
        if os.path.lexists(file) and not file.is_file() and not file.is_dir():
            file.unlink()  # a pipe, or a link to nowhere, in the place of a file of nestpatch's own
        write_bytes(file, data, overwrite=True, owner=state_dir.owner)


def _read(file: Path) -> bytes | None:
    try:
        return read_bounded(file, nest.MAX_PACK, follow=False)
    except OSError:
        return None


def load_pack(state_dir: StateDir, pack_id: str, label: str) -> Pack:
    """The kept copy of a pack, whose bytes have that SHA-256 and whose manifest says that name and version.

    Raises UndoError when it is missing, altered or another one.
    """
    path = state_dir.pack(pack_id)
    data = _read(path)
    if data is None or sha256(data).hexdigest() != pack_id:
        raise UndoError(
            f"{path}, the kept copy of {label}, is missing or altered",
            advice=_AGAIN,
        )
    try:
        pack = nest.decode(data)
    except PackError as error:
        raise UndoError(f"{path}, the kept copy of {label}, is no pack: {error}") from error
    if pack.label != label:
        raise LedgerError(f"{path} is {pack.label}, where the ledger names {label}")
    return pack


def load_packs(state_dir: StateDir, entries: Sequence[LedgerEntry], known: Mapping[str, Pack] | None = None) -> dict[str, Pack]:
    """The packs of applied entries, by id; those in `known` are at hand already.

    Raises UndoError or LedgerError when one is missing or altered.
    """
    packs = {}
    for entry in entries:
        pack = (known or {}).get(entry.pack_id) or load_pack(state_dir, entry.pack_id, entry.label)
        if pack.label != entry.label:
            raise LedgerError(f"the ledger calls {pack.label} {entry.label}")
        if {delta.name: delta.neurons for delta in pack} != {name: record.rows for name, record in entry.tensors.items()}:
            raise LedgerError(f"the ledger and the pack {entry.label} disagree about what it changes")
        packs[entry.pack_id] = pack
    return packs


def judge_kept(
    state_dir: StateDir, pack_id: str, policy: Policy, model: str | Path | None, *, allow_unsigned: bool = False
) -> SignatureResult:
    """Judges the signatures that are kept with a pack, as those of a file; links are not followed, and pipes not waited for.

    Raises SignatureError, UndoError.
    """
    path = state_dir.pack(pack_id)
    data = _read(path)
    if data is None or sha256(data).hexdigest() != pack_id:
        raise UndoError(f"the kept copy {path} is missing or altered", advice=_AGAIN)
    signatures = {file.name: _signature(file) for file in signature_files(path)}
    try:
        return check_signatures(data, signatures, policy, subject_of(model), file=path.name, allow_unsigned=allow_unsigned)
    except PackError as error:
        raise UndoError(f"the kept copy {path} cannot be used: {error}") from error


def _signature(file: Path) -> bytes:
    """The content of a kept signature. Raises SignatureFormatError for what is not a small file of its own."""
    try:
        return read_bounded(file, MAX_BYTES, follow=False, error=SignatureFormatError)
    except FileNotFoundError as error:
        raise SignatureFormatError(f"{file} is gone", advice="Run the command again.") from error


def proven_signers(state_dir: StateDir, pack_id: str, policy: Policy, model: str | Path | None) -> dict[str, str]:
    """Name -> key id of the trusted keys whose kept signatures are sound; none where anything is wrong with them."""
    try:
        outcome = judge_kept(state_dir, pack_id, policy, model, allow_unsigned=True)
    except (SignatureError, StateError):
        return {}
    return {signer.name: signer.key_id for signer in outcome.signers} if isinstance(outcome, VerifiedPack) else {}
