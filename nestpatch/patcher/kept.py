"""Packs that are kept beside a model, with their signatures: undoing needs their deltas, and they prove what is applied.

They travel with the model, so they are checked at every use. The name of a kept copy is the SHA-256 of its bytes; a copy with
other bytes is rejected. The signatures beside it are judged like those of any pack file.

Public: `keep`, `load_pack`, `load_packs`, `judge_kept`, `proven_signers`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from nestpatch.errors import LedgerError, PackError, SignatureError, SignatureFormatError, StateError, UndoError
from nestpatch.files.atomic import write_bytes
from nestpatch.files.reading import BLOCK, open_regular, read_bounded
from nestpatch.formats import nest
from nestpatch.pack import Pack
from nestpatch.patcher.ledger import LedgerEntry
from nestpatch.patcher.state_dir import StateDir
from nestpatch.signing.envelopes import MAX_BYTES
from nestpatch.signing.subject import Origin, Subject
from nestpatch.signing.trust import Policy
from nestpatch.signing.verify import SignatureResult, VerifiedPack, check_signatures, signature_files

_SUFFIX = re.compile(r"(?:\.[0-9a-f]{12})?\.sig", re.ASCII)


def keep(state_dir: StateDir, pack: Pack, pack_id: str, origin: Origin) -> None:
    """Keeps a copy of a pack and its signatures. Files of the same name with other content are replaced.

    Args:
        state_dir: Where the state of the model is.
        pack: The pack.
        pack_id: Its id.
        origin: Its signatures.

    Raises:
        OutputError: A file cannot be written.
    """
    kept = state_dir.pack(pack_id)
    signatures = {suffix: content for suffix, content in origin.signatures.items() if _SUFFIX.fullmatch(suffix)}
    if _digest(kept) != pack_id:
        _replace(kept, nest.encoded(pack), state_dir)
    for suffix, data in signatures.items():
        file = kept.with_name(f"{kept.name}{suffix}")
        if _read(file) != data:
            _replace(file, data, state_dir)


def _replace(file: Path, data: bytes | Iterable[bytes | memoryview], state_dir: StateDir) -> None:
    if os.path.lexists(file) and not file.is_file() and not file.is_dir():
        file.unlink()  # a pipe or a dangling link under the name of a kept file
    write_bytes(file, data, overwrite=True, owner=state_dir.owner)


def load_pack(state_dir: StateDir, pack_id: str, label: str) -> Pack:
    """Reads the kept copy of a pack.

    Args:
        state_dir: Where the state of the model is.
        pack_id: The id, which must be the SHA-256 of the copy.
        label: Name and version in the ledger, which must be those in the pack.

    Returns:
        The pack.

    Raises:
        UndoError: The copy is missing, altered or not a pack.
        LedgerError: It is a pack with another name or version.
    """
    path = state_dir.pack(pack_id)
    try:
        pack = nest.decode(_read_checked(path, pack_id, f"{path}, the kept copy of {label},"))
    except PackError as error:
        raise UndoError(f"{path}, the kept copy of {label}, is not a pack: {error}") from error
    if pack.label != label:
        raise LedgerError(f"{path} is {pack.label}, but the ledger names {label}")
    return pack


def load_packs(state_dir: StateDir, entries: Sequence[LedgerEntry], known: Mapping[str, Pack] | None = None) -> dict[str, Pack]:
    """Reads the kept copies of applied packs.

    Args:
        state_dir: Where the state of the model is.
        entries: The applied packs.
        known: Pack id -> pack, for packs that are not read again.

    Returns:
        Pack id -> pack, in the order of the entries.

    Raises:
        UndoError: A copy is missing, altered or not a pack.
        LedgerError: A pack has another name or version, or changes other tensors or rows, than its entry says.
    """
    packs = {}
    for entry in entries:
        pack = (known or {}).get(entry.pack_id) or load_pack(state_dir, entry.pack_id, entry.label)
        if pack.label != entry.label:
            raise LedgerError(f"the pack {entry.pack_id[:12]}.. is {pack.label}, but the ledger names {entry.label}")
        if {delta.name: delta.neurons for delta in pack} != {name: record.rows for name, record in entry.tensors.items()}:
            raise LedgerError(f"the ledger and the pack {entry.label} name different tensors or numbers of rows")
        packs[entry.pack_id] = pack
    return packs


def judge_kept(
    state_dir: StateDir, pack_id: str, policy: Policy, model: str | Path | None, *, allow_unsigned: bool = False
) -> SignatureResult:
    """Judges the signatures that are kept with a pack, like those of a pack file.

    Args:
        state_dir: Where the state of the model is.
        pack_id: The pack.
        policy: Whose signatures count.
        model: The model as the user names it; None for no particular one.
        allow_unsigned: Lets the pack pass with too few signatures, but never with a wrong one.

    Returns:
        The outcome, with the pack that was checked.

    Raises:
        SignatureError: Too few trusted keys signed the pack, or a signature is wrong or not a small regular file.
        UndoError: The kept copy is missing, altered or not a pack.
    """
    path = state_dir.pack(pack_id)
    data = _read_checked(path, pack_id, f"the kept copy {path}")
    signatures: dict[str, bytes] = {}
    for file in signature_files(path):
        try:
            signatures[file.name] = read_bounded(file, MAX_BYTES, follow=False, error=SignatureFormatError)
        except FileNotFoundError as error:
            raise SignatureFormatError(f"{file} was removed in the meantime", advice="Run the command again.") from error
    try:
        return check_signatures(data, signatures, policy, Subject.of(model), file=path.name, allow_unsigned=allow_unsigned)
    except PackError as error:
        raise UndoError(f"the kept copy {path} cannot be used: {error}") from error


def proven_signers(state_dir: StateDir, pack_id: str, policy: Policy, model: str | Path | None) -> dict[str, str]:
    """The signers of a kept pack whose signatures are valid here.

    Args:
        state_dir: Where the state of the model is.
        pack_id: The pack.
        policy: The trusted keys.
        model: The model as the user names it; None for no particular one.

    Returns:
        Name -> key id of the trusted keys. Empty if the pack or any of its signatures is missing or wrong.
    """
    try:
        outcome = judge_kept(state_dir, pack_id, policy, model, allow_unsigned=True)
    except (SignatureError, StateError):
        return {}
    return {signer.name: signer.key_id for signer in outcome.signers} if isinstance(outcome, VerifiedPack) else {}


def _read_checked(path: Path, pack_id: str, what: str) -> bytes:
    """The bytes of a kept copy. Raises UndoError when their SHA-256 is not the pack id."""
    data = _read(path)
    if data is None or sha256(data).hexdigest() != pack_id:
        raise UndoError(
            f"{what} is missing or altered",
            advice="Apply the pack's file again: nestpatch apply MODEL PACK --in-place restores the copy.",
        )
    return data


def _digest(file: Path) -> str:
    """SHA-256 of a kept file, block by block; empty where it cannot be read."""
    state = sha256()
    try:
        with open_regular(file, follow=False) as raw:
            while block := raw.read(BLOCK):
                state.update(block)
    except OSError:
        return ""
    return state.hexdigest()


def _read(file: Path) -> bytes | None:
    try:
        return read_bounded(file, nest.MAX_PACK, follow=False)
    except OSError:
        return None
