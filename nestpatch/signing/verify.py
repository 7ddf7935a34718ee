"""Signing a pack, and judging the signatures of one: `judge` decides on values, the other functions read and write files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

from nestpatch.errors import OutputError, PackError, SignatureFormatError, UnsignedError, UntrustedError
from nestpatch.files import read_bounded
from nestpatch.formats import nest
from nestpatch.formats.atomic import write_bytes
from nestpatch.pack import Pack
from nestpatch.signing import bundle
from nestpatch.signing.dsse import MAX_BYTES
from nestpatch.signing.keys import PrivateKey
from nestpatch.signing.trust import Names, Policy, names_of

MAX_SIGNATURES = 64
SUFFIX = ".sig"


@dataclass(frozen=True)
class Signer:
    """A trusted key that signed a pack."""

    name: str
    key_id: str
    file: str
    """The signature's file name."""


@dataclass(frozen=True)
class Signed:
    """The pack was signed by as many trusted keys as the policy wants, and at least by one."""

    pack: Pack
    """What was signed. Use this value: the file may change after it was checked."""
    pack_id: str
    signers: tuple[Signer, ...]
    required: int

    def as_json(self) -> dict[str, Any]:
        """Facts for scripts."""
        signers = [{"name": s.name, "key": s.key_id, "file": s.file} for s in self.signers]
        return {"verdict": "signed", "pack": self.pack_id, "signers": signers, "required": self.required, "reason": ""}


@dataclass(frozen=True)
class Unproven:
    """Too few trusted keys have signed the pack, which the policy or the caller lets pass. What signatures there are fit it."""

    pack: Pack
    pack_id: str
    reason: str
    required: int

    def as_json(self) -> dict[str, Any]:
        """Facts for scripts."""
        return {"verdict": "unproven", "pack": self.pack_id, "signers": [], "required": self.required, "reason": self.reason}


Outcome: TypeAlias = Signed | Unproven


def signers_of(outcome: Outcome) -> dict[str, str]:
    """Name -> key id of those whose signatures counted."""
    return {signer.name: signer.key_id for signer in outcome.signers} if isinstance(outcome, Signed) else {}


def judge(
    data: bytes,
    signatures: Mapping[str, bytes],
    policy: Policy,
    names: Names = (),
    *,
    file: str = "the pack",
    allow_unsigned: bool = False,
) -> Outcome:
    """Whether the bytes of a pack are signed as the policy wants for a model of these names.

    `signatures`: file name -> content of each signature; `file` is for messages. `allow_unsigned` forgives missing and unknown
    signatures, never wrong ones. Raises SignatureFormatError, BadSignatureError, UnsignedError, UntrustedError; PackError
    when the bytes are no pack.
    """
    digest = sha256(data).hexdigest()
    signed: dict[str, Signer] = {}
    unknown: list[str] = []
    for source, content in signatures.items():
        found = bundle.parse(content, source)
        found.check_file(digest, file)
        trusted = policy.find(found.key_id)
        if trusted is None:
            unknown.append(found.key_id)
            continue
        found.check_key(trusted.key)
        signed[found.key_id] = Signer(trusted.name, found.key_id, source)
    pack = nest.decode(data)
    rule = policy.rule_for(names)
    counting = {trusted.key.key_id for trusted in policy.counting(rule, names)}
    signers = tuple(signer for key_id, signer in signed.items() if key_id in counting)
    if signers and len(signers) >= rule.require:
        return Signed(pack, digest, signers, rule.require)
    others = tuple(signer for signer in signed.values() if signer not in signers)
    lack = _lack(file, rule.require, signers, others, unknown)
    if rule.require and not allow_unsigned:
        raise lack
    return Unproven(pack, digest, str(lack), rule.require)


def _lack(
    file: str, required: int, signers: Sequence[Signer], others: Sequence[Signer], unknown: Sequence[str]
) -> UnsignedError | UntrustedError:
    """What is missing, as the error that says so."""
    if not signers and not others and not unknown:
        return UnsignedError(f"{file} is not signed")
    keys = [f"{signer.name}, who is not trusted for this model" for signer in others]
    keys += [f"{key_id[:12]}.., which is not trusted here" for key_id in unknown]
    if not signers:
        return UntrustedError(f"{file} is signed by {'; '.join(keys)}")
    who = ", ".join(signer.name for signer in signers)
    more = f"; further by {'; '.join(keys)}" if keys else ""
    return UntrustedError(f"{file} is signed by {len(signers)} of the {required} keys that the policy wants: {who}{more}")


def verify_signature(
    path: str | Path, policy: Policy, model: str | Path | None = None, *, allow_unsigned: bool = False
) -> Outcome:
    """Checks the signatures that lie beside a pack file: `<file>.sig`, and `<file>.<12 hex digits>.sig` of further signers.

    `model`: what the pack is for, a path or a Hub id, as the user names it; it decides which rules and keys count.
    Raises as `judge` does, and PackError when the pack cannot be read.
    """
    file = Path(path)
    signatures, data = read_signatures(file), nest.read_bytes(file)
    names = () if model is None else names_of(model)
    try:
        return judge(data, signatures, policy, names, file=file.name, allow_unsigned=allow_unsigned)
    except PackError as error:
        raise type(error)(f"{path}: {error}", advice=error.advice) from error


def read_signatures(path: Path) -> dict[str, bytes]:
    """File name -> content of the signatures that lie beside a pack. Raises SignatureFormatError when one cannot be read."""
    return {found.name: _read_signature(found) for found in signature_files(path)}


def signature_files(path: Path) -> list[Path]:
    """The signature files of a pack, that of the first signer first."""
    pattern = re.compile(rf"{re.escape(path.name)}(?:\.[0-9a-f]{{12}})?{re.escape(SUFFIX)}")
    try:
        names = sorted(name for name in os.listdir(path.parent) if pattern.fullmatch(name))  # noqa: PTH208 - names alone
    except OSError:
        return []
    if len(names) > MAX_SIGNATURES:
        raise SignatureFormatError(f"{path.name} has {len(names)} signatures; at most {MAX_SIGNATURES} are read")
    return [path.with_name(name) for name in sorted(names, key=lambda name: (len(name), name))]


def _read_signature(path: Path) -> bytes:
    try:
        return read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise SignatureFormatError(
            f"cannot read {path}: {error.strerror or error}", advice="Check the file's permissions."
        ) from error


@dataclass(frozen=True)
class Signature:
    """A signature file that was written."""

    file: Path
    pack_id: str
    key_id: str


def sign_pack(path: str | Path, key: PrivateKey, output: Path | None = None, *, overwrite: bool = False) -> Signature:
    """Signs a pack file. Writes `<file>.sig`, or beside the signature of another key `<file>.<key id, 12 digits>.sig`.

    Raises PackError when the file is no pack, OutputError when the place is taken or cannot be written.
    """
    file = Path(path)
    pack_id = nest.pack_id(nest.read(file))
    key_id = key.public.key_id
    place = output or _free_place(file, key_id, overwrite=overwrite)
    write_bytes(place, bundle.sign(pack_id, file.name, key), overwrite=overwrite)
    return Signature(place, pack_id, key_id)


def _free_place(file: Path, key_id: str, *, overwrite: bool) -> Path:
    first = file.with_name(f"{file.name}{SUFFIX}")
    own = file.with_name(f"{file.name}.{key_id[:12]}{SUFFIX}")
    for taken in (place for place in (first, own) if os.path.lexists(place)):
        if bundle.parse(_read_signature(taken), taken.name).key_id == key_id:
            if overwrite:
                return taken
            raise OutputError(f"{taken} exists already, by the same key", advice="Pass --overwrite to sign again.")
    return own if os.path.lexists(first) else first
